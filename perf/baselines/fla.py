"""flash-linear-attention's fused_recurrent_gated_delta_rule, Triton (fla-core 0.6.0).

It knows no pool: the initial states are dense, one a sequence, and the final ones are a float32
tensor of their own. The states are therefore gathered from the slots before it and written back
after it, as a caller with a pool must, and both are timed: a step moves its states about three
times. Gates and norms are computed inside its kernel.
"""

from __future__ import annotations

import importlib

import torch
from gdn_case import Inputs
from workloads import GDNWorkload

import baselines

INSTALL = "pip install fla-core==0.6.0 einops"


def unavailable() -> str | None:
    """Why it does not run here."""
    part = "ops/gated_delta_rule/fused_recurrent.py"
    return baselines.missing("fla", part, INSTALL) or baselines.missing(
        "einops", "__init__.py", INSTALL
    )


def refuse(w: GDNWorkload) -> str | None:
    """Why a workload is not run."""
    return None if w.mode == "decode" else f"returns the last state only, asked for {w.mode}"


def run_steps(w: GDNWorkload, i: Inputs) -> torch.Tensor:
    """T steps of every sequence; the pool is updated."""
    ops = importlib.import_module("fla.ops.gated_delta_rule")
    s = i.steps
    slots = i.slots.long()
    out, final = ops.fused_recurrent_gated_delta_rule(
        s.q,
        s.k,
        s.v,
        g=s.a,
        beta=s.b,
        initial_state=i.state.index_select(0, slots),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=s.A_log,
        dt_bias=s.dt_bias,
        use_beta_sigmoid_in_kernel=True,
        state_v_first=True,
    )
    i.state.index_copy_(0, slots, final.to(i.state.dtype))
    return out
