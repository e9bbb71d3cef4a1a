"""`cutemoe selftest`: FP4 layers by the instructions of SM120, and by their emulation.

For owners of a card that the kernels were written for and never ran on. Weights and activations
are both NVFP4 or both MXFP4, or weights NVFP4 and activations bf16, of which nothing is emulated.
Layers whose every sum is exact must equal torch bit for bit, whatever
computes them. Random layers tell how far instruction and emulation are apart: they add up the same
products in another order, so they differ by float32 rounding, and where that moves a code of the
FC1 output, by one code.

The last line is made to be pasted into an issue. On other cards only the emulation runs.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import cutemoe
from cutemoe import PreparedMoE, QuantizedTensor, ReLU2, SwiGLU
from cutemoe.errors import Unsupported
from cutemoe.runtime.device import Device

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
# x, layer, ids, weights and activation
Call = tuple[torch.Tensor, PreparedMoE, torch.Tensor, torch.Tensor, Any]


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
        found = Findings(str(Device.of(torch.device("cuda"))), versions)
        try:
            with torch.no_grad():
                compare(found)
        except Unsupported as e:
            found.error = str(e)
    text = json.dumps(asdict(found) | {"ok": found.ok}) if as_json else found.line()
    sys.stdout.write(text + "\n")
    return 0 if found.ok else 1


def compare(found: Findings) -> None:
    """Runs every layer of every kind on every back end that this card has."""
    native = Device.of(torch.device("cuda")).arch in (120, 121)
    names = STYLES if native else STYLES[:-1]
    for kind in KINDS:
        fp4 = kind in BLOCK
        ran = names if fp4 else [name for name in STYLES if name != EMULATED]
        found.exact |= {f"{kind} {name}": (0, 0) for name in ran}
        for call in layers(kind, exact=True):
            want = _call(*call, "reference")
            for name in ran:
                same = torch.equal(_call(*call, name), want)
                n, of = found.exact[f"{kind} {name}"]
                found.exact[f"{kind} {name}"] = n + same, of + 1
        if native and fp4:
            found.random[kind] = max(_apart(call) for call in layers(kind, exact=False))


def _apart(call: Call) -> float:
    """Greatest difference between instruction and emulation, in units of the greatest output."""
    a, b = (_call(*call, name).double() for name in (NATIVE, EMULATED))
    return float((a - b).abs().max()) / float(b.abs().max())


def layers(kind: str, exact: bool) -> Iterator[Call]:
    """A call of every shape."""
    format, activations = KINDS[kind]
    block, scales = BLOCK[format], None
    if activations == "nvfp4":
        scales = (2.0**-11, 2.0**-7) if exact else (0.005, 0.01)
    for seed, (tokens, slots, experts, *widths, gated) in enumerate(SHAPES):
        hidden, inter = (-(-n // block) * block for n in widths)
        g = torch.Generator().manual_seed(seed)
        rows = inter * (2 if gated else 1)
        w13, w2 = (
            _weight(format, (experts, n, k), g, exact) for n, k in ((rows, hidden), (hidden, inter))
        )
        moe = cutemoe.prepare_moe(
            w13, w2, activations=activations, input_scale=scales, device="cuda", backend=NATIVE
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
        yield x.bfloat16().cuda(), moe, ids.cuda(), weights.cuda(), activation


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
