"""A worker of workers.py: a job a line on stdin, its kernels a line on stdout."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from dataclasses import asdict

import torch

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
                where, fields = json.loads(line)
                module, name = where.split(":")
                job = getattr(importlib.import_module(module), name)(**fields)
                with torch.no_grad():
                    job.run()
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
