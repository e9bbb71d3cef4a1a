"""What this package needs: ranges it accepts, and versions it has really been run with."""

from __future__ import annotations

import re
from dataclasses import dataclass

OK, WARN, FAIL = "OK", "WARN", "FAIL"

Release = tuple[int, ...]


@dataclass(frozen=True)
class Requirement:
    """A dependency: accepted from `minimum` on and before `below`.

    Attributes:
        name: of the distribution; "python" is the interpreter.
        tested: versions the tests have passed with.
        forbidden: versions that must not be used, and why.
        optional: what does without it, empty if nothing does.
    """

    name: str
    minimum: str
    below: str = ""
    tested: tuple[str, ...] = ()
    forbidden: tuple[tuple[str, str], ...] = ()
    optional: str = ""

    @property
    def range(self) -> str:
        """The accepted versions, as pip writes them."""
        return f">={self.minimum}" + (f",<{self.below}" if self.below else "")

    def judge(self, version: str) -> tuple[str, str]:
        """OK, WARN or FAIL for an installed version, and why."""
        r = release(version)
        for bad, why in self.forbidden:
            if same(r, release(bad)):
                return FAIL, f"{version} must not be used: {why}"
        if r < release(self.minimum) or (self.below and r >= release(self.below)):
            return FAIL, f"{version} is outside {self.range}"
        tested = ", ".join(self.tested)
        if any(same(r, release(t)) for t in self.tested):
            return OK, f"{version}, a tested version"
        if self.tested and r > max(release(t) for t in self.tested):
            return WARN, f"{version} is newer than the tested {tested}"
        return OK, f"{version}, within {self.range} (tested: {tested})"


_ELECTS = "bulk copies elect a lane themselves there, and kernels that do so too deadlock"

MATRIX = (
    Requirement("python", "3.10", tested=("3.11", "3.12")),
    Requirement("torch", "2.10", tested=("2.11.0", "2.13.0", "2.14.1")),
    Requirement(
        "triton", "3.6", tested=("3.6.0", "3.8.0", "3.9.0"), optional="the reference back ends"
    ),
    Requirement(
        "nvidia-cutlass-dsl",
        "4.7",
        "5",
        tested=("4.8.1",),
        forbidden=(("4.6.0", _ELECTS), ("4.6.1", _ELECTS)),
        optional="every back end but CuTe",
    ),
    Requirement(
        "apache-tvm-ffi", "0.1.6", "0.2", tested=("0.1.15",), optional="every back end but CuTe"
    ),
)

# Triton 3.6's interpreter uses conversions that numpy 2.4 removed
INTERPRETER_NUMPY = Requirement("numpy", "1.26", "2.4", tested=("2.3.5",))


def release(version: str) -> Release:
    """The numbers a version starts with: "2.13.0+cpu" -> (2, 13, 0)."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(n) for n in found[1].split(".")) if found else ()


def same(installed: Release, wanted: Release) -> bool:
    """Whether a version is the wanted one, as far as that is spelled out."""
    return installed[: len(wanted)] == wanted
