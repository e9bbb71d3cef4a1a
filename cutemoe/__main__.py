"""The command line: `cutemoe demo`, `selftest`, `doctor`, `compile`, `tune` and `cache`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from cutemoe import __version__

COMMANDS = {
    "demo": "run the layers of real models on every back end of this machine, checked and timed",
    "selftest": "compare the FP4 instructions of SM120 and SM121 with their emulation, in one line",
    "doctor": "say what works on this machine, and why the rest does not",
    "compile": "compile the kernels of a preset ahead, for any architecture, without a GPU",
    "tune": "measure the configurations of a preset's layers on this card and keep the fastest",
    "cache": "list, verify or clear the compiled kernels that are kept",
}


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    p = argparse.ArgumentParser(prog="cutemoe", description="Kernels for 4-bit MoE layers and GDN.")
    p.add_argument("--version", action="version", version=f"cutemoe {__version__}")
    commands = p.add_subparsers(dest="command", metavar="|".join(COMMANDS), required=True)
    for name, text in COMMANDS.items():
        c = commands.add_parser(name, help=text, description=text)
        c.add_argument("--json", action="store_true", help="print one json object, no table")
        if name == "compile":
            c.add_argument("--arch", help="sm_80, sm_90a, sm_120a, ...; by default this card's")
            c.add_argument(
                "--preset", action="append", required=True, help="a model; may be given again"
            )
            c.add_argument("--workers", type=int, help="processes; by default one a core")
        if name == "tune":
            c.add_argument(
                "--preset", action="append", required=True, help="a model; may be given again"
            )
            c.add_argument("--weights", help="formats, a,b,...; by default all of the preset")
            c.add_argument("--sizes", help="tokens of a call, a,b,...; by default 1 to 4096")
            c.add_argument("--seconds", type=float, default=300.0, help="for everything")
            c.add_argument("--out", help="folder of the table; by default beside the kernels")
        if name == "cache":
            c.add_argument("action", nargs="?", default="list", choices=("list", "verify", "clear"))
        if name in ("compile", "cache"):
            c.add_argument("--cache-dir", help="the folder; by default CUTEMOE_CACHE_DIR")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, or 1 where something is wrong."""
    args = vars(parser().parse_args(argv))
    command = importlib.import_module(f"cutemoe.commands.{args.pop('command')}")
    return command.run(as_json=args.pop("json"), **args)


if __name__ == "__main__":
    sys.exit(main())
