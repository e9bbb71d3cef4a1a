"""FlashInfer's gated delta net decode and multi-token kernels, CuTe DSL (0.7.2).

One public function serves T = 1 and more on a pool with slots: float32 states go to its
pretranspose kernel at T = 1 and to its MTP kernel beyond, bf16 states to its bf16_state kernels.
Its generic kernels are asked for, not those of one newer card.
"""

from __future__ import annotations

import importlib

import torch
from gdn_case import Inputs
from workloads import GDNWorkload

import baselines

INSTALL = "pip install flashinfer-python==0.7.2.post1"


def unavailable() -> str | None:
    """Why it does not run here."""
    return baselines.missing("flashinfer", "gdn_decode.py", INSTALL)


def refuse(w: GDNWorkload) -> str | None:
    """Why a workload is not run."""
    if w.head_dim != 128:
        return f"head dimension 128, got {w.head_dim}"
    if w.mode != "decode" and w.tokens == 1:
        return "writes states after every token for more than one token only"
    if w.mode == "snapshots+update" and w.state == "bfloat16":
        return "its bf16 kernel does not write the last state where it writes all of them"
    return None


def run_steps(w: GDNWorkload, i: Inputs) -> torch.Tensor:
    """T steps of every sequence; the pool is updated where the mode says so."""
    gdn = importlib.import_module("flashinfer.gdn_decode")
    s = i.steps
    out, _ = gdn.gated_delta_rule_decode_pretranspose(
        s.q,
        s.k,
        s.v,
        None,
        s.A_log,
        s.a,
        s.dt_bias,
        s.b,
        output=i.out,
        initial_state=i.state,
        initial_state_indices=i.slots,
        intermediate_states_buffer=i.snapshots,
        disable_state_update=w.mode == "snapshots",
        backend="flashinfer",
    )
    return out
