"""The tensors of one gated delta net call, as every back end receives them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DraftTensors(NamedTuple):
    """The record of an open window; see `GDNDraft`."""

    u: torch.Tensor
    k: torch.Tensor
    k_rnorm: torch.Tensor
    log_g: torch.Tensor
    mark: torch.Tensor


class GDNTensors(NamedTuple):
    """Tensors and run-time numbers of a call.

    Attributes:
        q, k: [B, T, HQ, DK].
        v, out: [B, T, HV, DV].
        gates: (a, b, A_log, dt_bias) or (g, beta).
        state: [slots, HV, DV, DK], or [slots, HV, DK, DV] for the layout "kv".
        scale: factor of q.
        state_indices: integer [B] or None.
        intermediate_states: [B, steps, HV, ...] laid out as state, or None (decode).
        intermediate_indices: integer [B, T] or None (decode).
        draft, num_accepted: the open windows and integer [B] (verify).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: tuple[torch.Tensor, ...]
    state: torch.Tensor
    out: torch.Tensor
    scale: float
    state_indices: torch.Tensor | None = None
    intermediate_states: torch.Tensor | None = None
    draft: DraftTensors | None = None
    num_accepted: torch.Tensor | None = None
    intermediate_indices: torch.Tensor | None = None

    def opened(self) -> tuple[DraftTensors, torch.Tensor]:
        """draft and num_accepted of a verify call."""
        if self.draft is None or self.num_accepted is None:
            raise TypeError("draft and num_accepted belong to gdn_verify")
        return self.draft, self.num_accepted
