"""`cutemoe doctor`: what works on this machine, and why the rest does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

import cutemoe
from cutemoe.commands import machine
from cutemoe.commands.cache import entries
from cutemoe.commands.matrix import FAIL, INTERPRETER_NUMPY, MATRIX, OK, WARN, Requirement
from cutemoe.commands.table import table
from cutemoe.registry import OPS
from cutemoe.runtime import settings
from cutemoe.runtime.cache import Cache
from cutemoe.runtime.device import Device

TESTED_ARCH = 90
LOWEST_ARCH = 80
REFERENCE = "reference"


@dataclass(frozen=True)
class Finding:
    """One line: OK, WARN or FAIL, what was looked at, what was seen."""

    level: str
    subject: str
    text: str


def run(as_json: bool = False) -> int:
    """Prints every finding; 1 if one of them is FAIL, else 0."""
    found = [f for check in CHECKS for f in guarded(check)]
    failed = sum(f.level == FAIL for f in found)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(f) for f in found]}))
        return 1 if failed else 0
    print(table(["", "what", "finding"], [[f.level, f.subject, f.text] for f in found]))
    warned = sum(f.level == WARN for f in found)
    print(f"\n{len(found)} findings, {warned} WARN, {failed} FAIL")
    return 1 if failed else 0


def guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; what it raises is a finding too."""
    try:
        yield from check()
    except Exception as e:
        subject = check.__name__.replace("_", " ")
        yield Finding(FAIL, subject, f"{type(e).__name__}: {e}")


def versions() -> Iterator[Finding]:
    """Python and the dependencies against the tested matrix."""
    for requirement in MATRIX:
        yield _version(requirement)
    if settings.triton_interprets():
        yield _interpreter_numpy()


def _version(requirement: Requirement) -> Finding:
    version = machine.installed(requirement.name)
    if version is None:
        level = WARN if requirement.optional else FAIL
        text = f"not installed, {requirement.range} wanted"
        text += f"; without it: {requirement.optional}" if requirement.optional else ""
        return Finding(level, requirement.name, text)
    return Finding(*_named(requirement, version))


def _named(requirement: Requirement, version: str) -> tuple[str, str, str]:
    level, text = requirement.judge(version)
    return level, requirement.name, text


def _interpreter_numpy() -> Finding:
    """Triton's interpreter computes with numpy."""
    name, version = INTERPRETER_NUMPY.name, machine.installed("numpy")
    triton = machine.installed("triton") or ""
    if version is None:
        return Finding(FAIL, name, "not installed, and TRITON_INTERPRET=1 needs it")
    level, text = INTERPRETER_NUMPY.judge(version)
    if level == FAIL and not triton.startswith("3.6."):
        return Finding(WARN, name, f"{version} is newer than what the interpreter was tested with")
    return Finding(level, name, f"{text}; used by Triton's interpreter")


def cute_dsl() -> Iterator[Finding]:
    """The CuTe DSL: does it import, for which CUDA, and do its parts belong together."""
    parts = machine.dsl_parts()
    if not parts:
        return
    if len(set(parts.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in parts.items())
        yield Finding(FAIL, "CuTe DSL", f"its parts have different versions: {listed}")
        return
    used = any(b.name == "cute" for op in OPS for b in cutemoe.backends(op, "cpu"))
    note = "" if used else "; no back end uses it yet"
    try:
        yield Finding(OK, "CuTe DSL", machine.dsl_flavour() + note)
    except Exception as e:
        level = FAIL if used else WARN
        yield Finding(level, "CuTe DSL", f"does not import, {type(e).__name__}: {e}{note}")


def gpu() -> Iterator[Finding]:
    """Driver and devices."""
    api, version = machine.driver_api(), machine.driver()
    if api is None:
        yield Finding(OK, "GPU", "no CUDA driver: every op runs as torch on the CPU")
        return
    yield Finding(OK, "driver", f"{version or 'version unknown'}, CUDA {api}")
    if torch.version.cuda is None:
        yield Finding(WARN, "GPU", f"torch {torch.__version__} is a CPU build and sees no GPU")
        return
    devices = machine.gpus()
    if not devices:
        yield Finding(WARN, "GPU", f"torch for CUDA {torch.version.cuda} sees no device")
    for i, p in enumerate(devices):
        arch = 10 * p.major + p.minor
        text = f"{p.name}, sm_{arch}, {p.total_memory / 2**30:.0f} GiB"
        if arch < LOWEST_ARCH:
            yield Finding(WARN, f"GPU {i}", f"{text}: kernels need sm_{LOWEST_ARCH}, torch is used")
        elif arch != TESTED_ARCH:
            yield Finding(WARN, f"GPU {i}", f"{text}: kernels were run on sm_{TESTED_ARCH} only")
        else:
            yield Finding(OK, f"GPU {i}", text)


def kernel_cache() -> Iterator[Finding]:
    """The folder of compiled kernels: whose it is, what is in it. No C compiler is needed."""
    folder = settings.cache_dir()
    if settings.no_jit():
        yield Finding(OK, "CUTEMOE_NO_JIT", "a kernel that has to be compiled is an error")
    if folder is None:
        text = "CUTEMOE_CACHE_DIR is empty: every process compiles its kernels again"
        yield Finding(WARN, "kernel cache", text)
        return
    kept = Cache(folder)
    if (why := kept.trouble()) is not None:
        yield Finding(WARN, "kernel cache", f"{why}; every process compiles its kernels again")
        return
    lines = entries(kept)
    broken = sum(bool(line.broken) for line in lines)
    size = sum(line.nbytes for line in lines) / 2**20
    text = f"{len(lines)} kernels, {size:.1f} MB in {folder}"
    if broken:
        text += f"; {broken} broken, compiled again when needed (cutemoe cache verify)"
    yield Finding(WARN if broken else OK, "kernel cache", text)


def back_ends() -> Iterator[Finding]:
    """Which back ends of every op work here."""
    if (forced := settings.default_backend()) != "auto":
        yield Finding(WARN, "CUTEMOE_BACKEND", f"{forced!r} is used where a call says 'auto'")
    gpu = torch.cuda.is_available()
    for op in OPS:
        reasons = cutemoe.backends(op)
        usable = [r.name for r in reasons if r.reason is None]
        fast = [name for name in usable if name != REFERENCE]
        text = f"runs on {', '.join(usable)}" if usable else "runs on nothing"
        refused = [f"{r.name}: {r.reason}" for r in reasons if r.reason is not None]
        text = "; ".join([text, *refused])
        level = FAIL if not usable else WARN if gpu and not fast else OK
        yield Finding(level, op, text)


def smoke() -> Iterator[Finding]:
    """One small grouped GEMM on every usable back end, whose sums are exact in any order."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, w, offsets, expected = exact_gemm(device)
    for reason in cutemoe.backends("grouped_gemm"):
        if reason.reason is not None:
            continue
        subject = f"smoke test, {reason.name}"
        try:
            out = cutemoe.grouped_gemm(x, w, offsets, backend=reason.name)
        except Exception as e:
            yield Finding(FAIL, subject, f"grouped_gemm raised {type(e).__name__}: {e}")
            continue
        wrong = int((out != expected).sum())
        text = f"grouped_gemm on {Device.of(device)}: {wrong} of {out.numel()} values are wrong"
        if wrong:
            yield Finding(FAIL, subject, text)
        else:
            yield Finding(OK, subject, f"grouped_gemm on {Device.of(device)} is exact")


def exact_gemm(
    device: torch.device,
) -> tuple[torch.Tensor, cutemoe.QuantizedTensor, torch.Tensor, torch.Tensor]:
    """x [5, 64], mxfp4 w [2, 32, 64], offsets [3], and the product; every partial sum is exact."""
    x = (torch.arange(5 * 64).view(5, 64) % 7 - 3).to(torch.bfloat16)
    codes = (torch.arange(2 * 32 * 64).view(2, 32, 64) * 5 % 13 - 6).clamp(-4, 4).float()
    w = cutemoe.quantize(codes, "mxfp4")
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    groups = [x[:2].double() @ codes[0].double().T, x[2:].double() @ codes[1].double().T]
    expected = torch.cat(groups).to(torch.bfloat16)
    return x.to(device), w.to(device), offsets.to(device), expected.to(device)


CHECKS = (versions, cute_dsl, gpu, kernel_cache, back_ends, smoke)
