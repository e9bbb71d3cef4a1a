"""Named workloads: what perf measures, and the names by which records, plots and tuning call it.

A workload is a shape with the batches it is measured at; nothing here touches a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

MOE_BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
GDN_BATCHES = (1, 4, 16, 64, 256)
GDN_MODES = ("decode", "snapshots", "snapshots+update", "verify")


@dataclass(frozen=True)
class MoEWorkload:
    """A mixture-of-experts layer with its routing: one call is route and fused_moe.

    Attributes:
        hidden, intermediate, experts, top_k: H, I, E, K.
        weights, group_size: format of both weights; group_size None is the format's default.
        activations: what the GEMMs multiply with: "bf16", "fp8", "nvfp4" or "mxfp4".
        gate_up: order of the rows of w13.
        swiglu: (alpha, beta, limit) of the gated unit.
        biases: both projections have one.
        routing: keyword arguments of `cutemoe.route` besides top_k.
        skew: of the logits: "none"; "one", every token's first choice is the same expert; "zipf",
            expert r is chosen in proportion to 1 / (r + 1).
        batches: tokens of a call.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    weights: str = "mxfp4"
    group_size: int | None = None
    activations: str = "bf16"
    gate_up: str = "gate_up"
    swiglu: tuple[float, float, float | None] = (1.0, 0.0, None)
    biases: bool = False
    routing: tuple[tuple[str, Any], ...] = (("method", "softmax_topk"),)
    skew: str = "none"
    batches: tuple[int, ...] = MOE_BATCHES

    @property
    def op(self) -> str:
        """The public function whose back ends the workload compares."""
        return "fused_moe"


@dataclass(frozen=True)
class GemmWorkload:
    """One grouped GEMM of an expert layer: rows of tokens * top_k slots, sorted by expert.

    Attributes:
        n, k: N and Kdim of the weights.
        experts, top_k: groups, and rows a token brings.
        weights, group_size, activations: as in MoEWorkload; "fp8" has a scale for each row.
        batches: tokens of a call.
    """

    name: str
    n: int
    k: int
    experts: int
    top_k: int
    weights: str = "mxfp4"
    group_size: int | None = None
    activations: str = "bf16"
    batches: tuple[int, ...] = MOE_BATCHES

    @property
    def op(self) -> str:
        """The public function whose back ends the workload compares."""
        return "grouped_gemm"


@dataclass(frozen=True)
class GDNWorkload:
    """Gated delta net steps: one call advances every sequence by `tokens` tokens.

    Attributes:
        v_heads, q_heads, head_dim: HV, HQ, D.
        state: dtype of the state pool, "float32" or "bfloat16".
        tokens: T, tokens a sequence.
        mode: "decode" updates the state; "snapshots" writes the state after every token and keeps
            the pool; "snapshots+update" does both; "verify" is gdn_verify over a draft.
        batches: sequences of a call.
    """

    name: str
    v_heads: int
    q_heads: int
    head_dim: int
    state: str
    tokens: int
    mode: str
    batches: tuple[int, ...] = GDN_BATCHES

    @property
    def op(self) -> str:
        """The public function whose back ends the workload compares."""
        return "gdn_verify" if self.mode == "verify" else "gdn_decode"


Workload = MoEWorkload | GemmWorkload | GDNWorkload

GPT_OSS: dict[str, Any] = {
    "gate_up": "interleaved",
    "swiglu": (1.702, 1.0, 7.0),
    "biases": True,
    "routing": (("method", "topk_softmax"),),
}
DEEPSEEK_ROUTING = (
    ("method", "grouped_sigmoid"),
    ("n_group", 8),
    ("topk_group", 4),
    ("scale", 2.5),
)


def _moe_shapes() -> tuple[MoEWorkload, ...]:
    """One workload a model, in the format its users ask for first."""
    return (
        MoEWorkload("headline", 4096, 2048, 256, 6),
        MoEWorkload("gpt_oss_120b", 2880, 2880, 128, 4, **GPT_OSS),
        MoEWorkload("gpt_oss_20b", 2880, 2880, 32, 4, **GPT_OSS),
        MoEWorkload("deepseek_v3", 7168, 2048, 256, 8, routing=DEEPSEEK_ROUTING),
        MoEWorkload("qwen3_next", 2048, 512, 512, 10),
    )


def _variants(w: MoEWorkload) -> tuple[MoEWorkload, ...]:
    """The other weight and activation formats on the same shape."""
    return (
        dataclasses.replace(
            w, name=f"{w.name}_w4a8", weights="int4", group_size=128, activations="fp8"
        ),
        dataclasses.replace(w, name=f"{w.name}_nvfp4", weights="nvfp4"),
        dataclasses.replace(w, name=f"{w.name}_w4a4", weights="nvfp4", activations="nvfp4"),
        dataclasses.replace(w, name=f"{w.name}_mxfp4_w4a4", weights="mxfp4", activations="mxfp4"),
    )


def _skewed(w: MoEWorkload) -> tuple[MoEWorkload, ...]:
    """The same layer where tokens prefer some experts."""
    return tuple(
        dataclasses.replace(w, name=f"{w.name}_{skew}", skew=skew) for skew in ("one", "zipf")
    )


def _gemms(w: MoEWorkload) -> tuple[GemmWorkload, ...]:
    """Both products of a layer on their own."""
    common = (w.experts, w.top_k, w.weights, w.group_size, w.activations, w.batches)
    return (
        GemmWorkload(f"{w.name}_g1", 2 * w.intermediate, w.hidden, *common),
        GemmWorkload(f"{w.name}_g2", w.hidden, w.intermediate, *common),
    )


def _gdn() -> tuple[GDNWorkload, ...]:
    rows = []
    for heads, state, tokens, mode in product(
        (32, 64), ("float32", "bfloat16"), (1, 2, 4, 8), GDN_MODES
    ):
        short = "f32" if state == "float32" else "bf16"
        name = f"gdn_hv{heads}_{short}_t{tokens}_{mode}"
        rows.append(GDNWorkload(name, heads, 16, 128, state, tokens, mode))
    return tuple(rows)


def _by_name(rows: Iterable[Workload]) -> Mapping[str, Workload]:
    found: dict[str, Workload] = {}
    for w in rows:
        if w.name in found:
            raise ValueError(f"two workloads are called {w.name!r}")
        found[w.name] = w
    return found


_SHAPES = _moe_shapes()
_HEADLINE = (_SHAPES[0], *_variants(_SHAPES[0]))
WORKLOADS: Mapping[str, Workload] = _by_name(
    (
        *_SHAPES,
        *_HEADLINE[1:],
        *_variants(_SHAPES[4]),
        *_skewed(_SHAPES[0]),
        *_skewed(_HEADLINE[1]),
        # grouped_gemm takes no FP4 activations
        *(g for w in _HEADLINE if w.activations in ("bf16", "fp8") for g in _gemms(w)),
        *_gdn(),
    )
)


def select(patterns: Iterable[str]) -> tuple[Workload, ...]:
    """Workloads whose names match the patterns (`gdn_hv32_f32_*`), each once, in pattern order.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    chosen: dict[str, Workload] = {}
    for pattern in patterns:
        hits = [name for name in WORKLOADS if fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(f"no workload matches {pattern!r}; there are {', '.join(WORKLOADS)}")
        chosen.update((name, WORKLOADS[name]) for name in hits)
    return tuple(chosen.values())
