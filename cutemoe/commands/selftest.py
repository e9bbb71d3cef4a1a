"""`cutemoe selftest`: FP4 layers by the instructions of SM120, and by their emulation.

For owners of a card that the kernels were written for and never ran on. Weights and activations
are both NVFP4 or both MXFP4, or weights NVFP4 and activations bf16, of which nothing is emulated.
Layers whose every sum is exact must equal torch bit for bit, whatever
computes them. Random layers tell how far instruction and emulation are apart: they add up the same
products in another order, so they differ by float32 rounding, and where that moves a code of the
FC1 output, by one code.

The last line is made to be pasted into an issue. On other cards only the emulation runs. Kernels
are compiled first, by several processes: one after another they take minutes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import cutemoe
from cutemoe import PreparedMoE, QuantizedTensor, ReLU2, SwiGLU
from cutemoe.commands.workers import Progress, compiled
from cutemoe.errors import Unsupported
from cutemoe.runtime import cache
from cutemoe.runtime.device import CARDS, Device, target

NATIVE = "cute_nvfp4"
EMULATED = "cute_nvfp4_emulated"
STYLES = (
    NATIVE,
    "cute_nvfp4_pipeline",
    "cute_nvfp4_static",
    "cute_nvfp4_dynamic",
    EMULATED,
)
# of weights -> values that share a scale
BLOCK = {"nvfp4": 16, "mxfp4": 32}
# weights and activations; of the first two there are instructions
KINDS = {"nvfp4": ("nvfp4", "nvfp4"), "mxfp4": ("mxfp4", "mxfp4"), "w4a16": ("nvfp4", "bf16")}
# tokens, slots, experts, hidden, intermediate, gated: every tile height, widths no tile divides;
# widths are rounded up to blocks
SHAPES = (
    (1, 2, 8, 256, 192, True),
    (40, 4, 6, 544, 208, True),
    (96, 2, 4, 1024, 512, False),
    (150, 2, 4, 320, 144, True),
    (500, 2, 4, 1040, 272, True),
)
# processes that compile, of 0.55 GB each at their peak (DSL 4.8.1, two cores, 2026-11-30)
MOST_WORKERS = 16
# x, layer, ids, weights and activation
Call = tuple[torch.Tensor, PreparedMoE, torch.Tensor, torch.Tensor, Any]


@dataclass(frozen=True)
class Job:
    """A layer on a back end, compiled by one process: kind, index of the shape, back end."""

    kind: str
    shape: int
    backend: str

    def __str__(self) -> str:
        return f"{self.kind} layer {self.shape + 1} of {len(SHAPES)}, {self.backend}"

    def run(self) -> None:
        """Makes the call; inside `compile_only`."""
        _call(*_layer(self.kind, self.shape, exact=True), self.backend)


@dataclass
class Findings:
    """What was compared, and how it came out.

    Attributes:
        exact: kind and back end -> (layers equal to torch bit for bit, layers).
        random: kind -> largest difference between instruction and emulation, in units of the
            largest output, over the random layers; empty where there is no instruction.
        error: what stopped the test.
    """

    device: str
    versions: str
    exact: dict[str, tuple[int, int]] = field(default_factory=dict)
    random: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def ok(self) -> bool:
        """Everything ran and every exact layer is equal."""
        return not self.error and all(n == of for n, of in self.exact.values())

    def line(self) -> str:
        """The line to paste."""
        parts = [f"{name} {n}/{of}" for name, (n, of) in self.exact.items()]
        parts += [f"{name} native to emulated {most:.2e}" for name, most in self.random.items()]
        what = ", ".join(parts) if not self.error else self.error
        return f"{'OK' if self.ok else 'FAIL'}: {self.versions}, {self.device}: {what}"


def run(as_json: bool = False) -> int:
    """Prints the findings; 0 where all is equal, else 1."""
    versions = f"cutemoe {cutemoe.__version__}, torch {torch.__version__}, cutlass-dsl {_dsl()}"
    if not torch.cuda.is_available():
        found = Findings("no CUDA device", versions, error="needs a CUDA device")
    else:
        device = Device.of(torch.device("cuda"))
        found = Findings(str(device), versions)
        try:
            prepare(device, Progress(not as_json))
            with torch.no_grad():
                compare(found)
        except Unsupported as e:
            found.error = str(e)
    text = json.dumps(asdict(found) | {"ok": found.ok}) if as_json else found.line()
    sys.stdout.write(text + "\n")
    return 0 if found.ok else 1


def prepare(device: Device, progress: Progress) -> None:
    """Compiles what `compare` will launch; what fails here fails there with its error."""
    if device.target in CARDS and cache.opened() is not None:
        jobs = [
            Job(kind, shape, name)
            for kind in KINDS
            for shape in range(len(SHAPES))
            for name in _backends(kind, device)
        ]
        compiled(jobs, device.target, min(os.cpu_count() or 1, MOST_WORKERS), progress)


def compare(found: Findings) -> None:
    """Runs every layer of every kind on every back end that this card has."""
    device = Device.of(torch.device("cuda"))
    for kind in KINDS:
        ran = _backends(kind, device)
        found.exact |= {f"{kind} {name}": (0, 0) for name in ran}
        for call in layers(kind, exact=True):
            want = _call(*call, "reference")
            for name in ran:
                same = torch.equal(_call(*call, name), want)
                n, of = found.exact[f"{kind} {name}"]
                found.exact[f"{kind} {name}"] = n + same, of + 1
        if kind in BLOCK and _is_native(device):
            found.random[kind] = max(_apart(call) for call in layers(kind, exact=False))


def _is_native(device: Device) -> bool:
    return device.arch in (120, 121)


def _backends(kind: str, device: Device) -> list[str]:
    """What a kind of layers runs on: the emulation only where there is something to emulate."""
    names = STYLES if _is_native(device) else STYLES[:-1]
    return [name for name in names if kind in BLOCK or name != EMULATED]


def _apart(call: Call) -> float:
    """Greatest difference between instruction and emulation, in units of the greatest output."""
    a, b = (_call(*call, name).double() for name in (NATIVE, EMULATED))
    return float((a - b).abs().max()) / float(b.abs().max())


def layers(kind: str, exact: bool) -> Iterator[Call]:
    """A call of every shape."""
    for shape in range(len(SHAPES)):
        yield _layer(kind, shape, exact)


def _layer(kind: str, shape: int, exact: bool) -> Call:
    """A call on this card; inside `compile_only` on tensors of no memory."""
    tokens, slots, experts, *widths, gated = SHAPES[shape]
    format, activations = KINDS[kind]
    block, scales = BLOCK[format], None
    if activations == "nvfp4":
        scales = (2.0**-11, 2.0**-7) if exact else (0.005, 0.01)
    hidden, inter = (-(-n // block) * block for n in widths)
    g = torch.Generator().manual_seed(shape)
    rows = inter * (2 if gated else 1)
    w13, w2 = (
        _weight(format, (experts, n, k), g, exact) for n, k in ((rows, hidden), (hidden, inter))
    )
    place = _place()
    moe = cutemoe.prepare_moe(
        w13,
        w2,
        activations=activations,
        input_scale=scales,
        device="cpu" if place == "meta" else place,
        backend=NATIVE,
    )
    x = torch.randn(tokens, hidden, generator=g)
    if exact:
        # two values that are not 0 a row: FC1 sums are small multiples of 1/4
        at = torch.rand(tokens, hidden, generator=g).topk(2, dim=1).indices
        x = torch.zeros_like(x).scatter(1, at, x.gather(1, at).sign())
    ids = torch.rand(tokens, experts, generator=g).topk(slots, dim=1).indices.int()
    weights = torch.exp2(torch.randint(-2, 1, (tokens, slots), generator=g).float())
    # sigmoid(4096 n / 4) is 0, 1/2 or 1
    activation = SwiGLU(alpha=4096.0 if exact else 1.0, limit=7.0) if gated else ReLU2()
    parts = (x.bfloat16().to(place), moe.to(place), ids.to(place), weights.to(place))
    return *parts, activation


def _place() -> str:
    """The card; inside `compile_only` tensors have no memory."""
    return "cuda" if target() is None else "meta"


def _weight(
    format: str, shape: tuple[int, ...], g: torch.Generator, exact: bool
) -> QuantizedTensor:
    """Random codes with scales 1/2 and 1, or quantised normal weights."""
    *lead, k = shape
    if not exact:
        return cutemoe.quantize(torch.randn(shape, generator=g) * k**-0.5, format)
    codes = torch.randint(0, 256, (*lead, k // 2), generator=g, dtype=torch.uint8)
    exponent = torch.randint(-1, 1, (*lead, k // BLOCK[format]), generator=g)
    if format == "mxfp4":
        return QuantizedTensor(codes, (127 + exponent).to(torch.uint8), format=format)
    scale = torch.exp2(exponent.float()).to(torch.float8_e4m3fn)
    return QuantizedTensor(codes, scale, format=format)


def _call(
    x: torch.Tensor,
    moe: PreparedMoE,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: Any,
    backend: str,
) -> torch.Tensor:
    return cutemoe.fused_moe(x, moe, ids, weights, activation=activation, backend=backend)


def _dsl() -> str:
    try:
        return importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
