"""The worker of `cutemoe compile`: a job a line on stdin, its kernels a line on stdout."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict

from cutemoe.commands import prepare
from cutemoe.runtime import compile as compiling
from cutemoe.runtime.device import compile_only


def main(arch: str) -> None:
    """Answers until stdin ends; what compilers print goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    known: set[str] = set()
    with compile_only(arch):
        for line in sys.stdin:
            error = ""
            try:
                prepare.run(prepare.Job(**json.loads(line)))
            except Exception as e:
                traceback.print_exc()
                error = f"{type(e).__name__}: {e}"
            found = compiling.fetched()
            new = {key: asdict(found[key]) for key in found if key not in known}
            known |= set(new)
            answers.write(json.dumps({"kernels": new, "error": error}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
