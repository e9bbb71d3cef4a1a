"""What `expert_gemm` is compiled for, by name: layer_weight_group_activations_hidden_rows_arch.

Attributes of this module, so that the compile worker can look them up. For example
`fc1_mxfp4_32_bf16_2880_600_90` is FC1 of 2880 inputs at 600 rows on 256 experts on sm_90, in the
packed layout; `fc1_rows-mxfp4_32_...` in that of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cutemoe.gemm.plan import GemmConfig, WeightForm, choose_rows, choose_tile, packed_layout
from cutemoe.gemm.weight import PackedWeight
from cutemoe.runtime.device import Device
from cutemoe.triton_kernels.grouped_gemm import spec_of

EXPERTS = 256
SCALES = {"mxfp4": "*i32", "nvfp4": "*i32", "int4": "*fp32"}
# layers of rounding="eager"
EAGER: dict[str, dict[str, Any]] = {
    "eager-fc1": {"divide": 4, "activation": "swiglu", "order": "interleaved", "limit": True},
    "eager-silu": {"divide": 10, "activation": "silu"},
    "eager-gelu": {"divide": 8, "activation": "geglu_tanh"},
    "eager-fc2": {"scatter": True},
}
SCALES_IN_ROWS = {"mxfp4": "*u8", "nvfp4": "*u8", "int4": "*bf16"}


@dataclass(frozen=True)
class Case:
    """A configuration that some call on some card would choose."""

    layer: str
    weight: str
    group: int
    activations: str
    k: int
    rows: int
    arch: int

    def __str__(self) -> str:
        parts = (
            self.layer,
            self.weight,
            self.group,
            self.activations,
            self.k,
            self.rows,
            self.arch,
        )
        return "_".join(map(str, parts))

    @property
    def format(self) -> str:
        return self.weight.removeprefix("rows-")

    @property
    def packed(self) -> bool:
        return not self.dense and not self.weight.startswith("rows-")

    @property
    def dense(self) -> bool:
        return self.weight in ("bf16", "fp16")

    @property
    def config(self) -> GemmConfig:
        device = Device("cuda", 0, "card", self.arch, 132, 232448, True)
        layout = packed_layout(self.activations) if self.packed else "rows"
        form = WeightForm(self.format, self.group, layout, self.activations, self.k)
        block_m = choose_rows(form, self.rows / EXPERTS, device)
        return choose_tile(form, block_m, min(EXPERTS, self.rows) * 4096, device)

    @property
    def fp16(self) -> bool:
        return self.activations == "fp16"

    def spec(self) -> Any:
        """The compile-time argument."""
        meta = torch.empty(0, device="meta")
        w = PackedWeight(
            meta,
            None if self.dense else meta,
            meta,
            self.format,
            packed_layout(self.activations) if self.packed else "rows",
            self.group or None,
            (EXPERTS, 4096, self.k),
        )
        dtype = torch.float16 if self.fp16 else torch.bfloat16
        x = torch.empty(self.rows, self.k, dtype=dtype, device="meta")
        given: dict[str, Any] = {"scatter": True, "bias": True, "expert_scale": True}
        if self.layer in EAGER:
            given = {"bias": True, "eager": True, **EAGER[self.layer]}
        elif self.layer == "fc1":
            given = {
                "divide": 6,
                "token_scale": True,
                "bias": True,
                "activation": "swiglu",
                "limit": True,
                "alpha_e": True,
            }
        elif self.layer == "grouped":
            given = {"zero_tail": True, "token_scale": True}
        return spec_of(w, self.config, x, **given)

    def arguments(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Types of the run-time parameters, and the constexprs without the spec."""
        spec = self.spec()
        value = "*fp16" if self.fp16 else "*bf16"
        known = SCALES if self.packed else SCALES_IN_ROWS
        optional = {
            "x_scale_ptr": "*fp32" if spec.token_scale else None,
            "w_scale_ptr": known.get(self.format),
            "factor_ptr": "*fp32" if spec.factor else None,
            "expert_scale_ptr": "*fp32" if spec.expert_scale else None,
            "bias_ptr": "*fp32" if spec.bias else None,
            "slots_ptr": "*i32" if spec.divide or spec.scatter else None,
        }
        signature = {
            "x_ptr": value,
            "w_ptr": value if self.dense else "*i16" if self.packed else "*u8",
            "tiles_ptr": "*i32",
            "count_ptr": "*i32",
            "out_ptr": "*fp32" if spec.scatter else value,
            "alpha": "*fp32" if spec.alpha_e else "fp32",
            "beta": "fp32",
            "limit": "fp32",
            "K": "i32",
            "N": "i32",
            "stride_xm": "i64",
            "stride_om": "i64",
        }
        signature |= {name: kind for name, kind in optional.items() if kind}
        return signature, {name: None for name, kind in optional.items() if not kind}


def parse(name: str) -> Case:
    """The case of that name."""
    layer, weight, group, activations, k, rows, arch = name.split("_")
    return Case(layer, weight, int(group), activations, int(k), int(rows), int(arch))


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return parse(name).spec()
