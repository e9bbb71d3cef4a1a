"""Named sets of problems: what `cutemoe compile --preset` compiles, and what an error names.

Sizes only; commands/prepare.py makes calls of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """An expert layer with its routing.

    Attributes:
        hidden, intermediate, experts, top_k: H, I, E, K.
        formats: (format, group size or None, activations) of the weights that are compiled for.
        gate_up, swiglu, biases: as in perf's workloads.
        routing: keyword arguments of `route` besides top_k.
        gemms: both products as calls of `grouped_gemm` too.
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    formats: tuple[tuple[str, int | None, str], ...] = (("mxfp4", None, "bf16"),)
    gate_up: str = "gate_up"
    swiglu: tuple[float, float, float | None] = (1.0, 0.0, None)
    biases: bool = False
    routing: tuple[tuple[str, Any], ...] = (("method", "softmax_topk"),)
    gemms: bool = False


@dataclass(frozen=True)
class Heads:
    """Gated delta net heads: HQ, HV, D, and the dtypes of the state that are compiled for."""

    q_heads: int
    v_heads: int
    head_dim: int
    states: tuple[str, ...] = ("float32", "bfloat16")
    tokens: tuple[int, ...] = (1, 2, 4, 8)


@dataclass(frozen=True)
class Preset:
    """The operations of a model that are compiled ahead."""

    layer: Layer | None = None
    heads: Heads | None = None


_GPT_OSS: dict[str, Any] = {
    "gate_up": "interleaved",
    "swiglu": (1.702, 1.0, 7.0),
    "biases": True,
    "routing": (("method", "topk_softmax"),),
}
_ALL = (
    ("mxfp4", None, "bf16"),
    ("int4", 128, "fp8"),
    ("nvfp4", None, "bf16"),
    ("nvfp4", None, "nvfp4"),
)
_DEEPSEEK = (("method", "grouped_sigmoid"), ("n_group", 8), ("topk_group", 4), ("scale", 2.5))
PRESETS: Mapping[str, Preset] = {
    "headline": Preset(Layer(4096, 2048, 256, 6, _ALL, gemms=True)),
    "gpt-oss-120b": Preset(Layer(2880, 2880, 128, 4, **_GPT_OSS)),
    "gpt-oss-20b": Preset(Layer(2880, 2880, 32, 4, **_GPT_OSS)),
    "qwen3-next": Preset(Layer(2048, 512, 512, 10, _ALL), Heads(16, 32, 128)),
    "deepseek-v3": Preset(Layer(7168, 2048, 256, 8, routing=_DEEPSEEK)),
}


def covering(problem: Any) -> list[str]:
    """Names of the presets that compile for a problem of any family, by its sizes."""
    if getattr(problem, "rounding", "fused") != "fused":
        return []
    return [name for name, preset in PRESETS.items() if _covers(preset, problem)]


def _covers(preset: Preset, problem: Any) -> bool:
    def of(*names: str) -> tuple[Any, ...]:
        return tuple(getattr(problem, name, None) for name in names)

    layer, heads = preset.layer, preset.heads
    if heads and of("HV", "DK", "DV") == (heads.v_heads, heads.head_dim, heads.head_dim):
        return True
    if layer is None:
        return False
    sizes = (layer.hidden, layer.intermediate, layer.experts, layer.top_k)
    products = (
        (layer.experts, 2 * layer.intermediate, layer.hidden),
        (layer.experts, layer.hidden, layer.intermediate),
    )
    # routing has no hidden size, a grouped GEMM no layer
    return (
        of("hidden", "intermediate", "experts", "top_k") == sizes
        or (of("experts", "top_k", "hidden") == (layer.experts, layer.top_k, None))
        or (layer.gemms and of("groups", "n", "k") in products)
    )
