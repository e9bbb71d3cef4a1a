"""What a sequence's open window of draft tokens leaves behind, so that any prefix can be accepted.

Decision: record u = beta (v - S k), the raw key and the log decay of each token, a few KB a head,
and fold the accepted ones into the state while the next call reads it. Rejected: a state a token
(64 KB a head and token, and a copy after acceptance); recording rounded or normalised keys (the
folded state is then off by 1e-3 where this one has the bits of the sequential computation).

Decision: k, k_rnorm and log_g are kept twice and `mark` once for every row of the state. The
programs of one launch share a sequence's keys; each reads the half its own rows' mark names while
another writes the other half, so that one launch does it all without waiting for one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cutemoe.errors import invalid
from cutemoe.gdn import op

MAX_TOKENS = 1 << 13


@dataclass(frozen=True, eq=False)
class GDNDraft:
    """The open windows of a pool, one for every slot; tensors, so that CUDA graphs can hold them.

    Attributes:
        u: float32 [slots, max_tokens, HV, DV].
        k: raw keys [slots, 2, max_tokens, HQ, DK].
        k_rnorm: float32 [slots, 2, max_tokens, HQ], the factor of each key (1 without qk_l2norm).
        log_g: float32 [slots, 2, max_tokens, HV].
        mark: int16 [slots, HV, DV], 2 * (tokens in the window) + (the half they are in).
    """

    u: torch.Tensor
    k: torch.Tensor
    k_rnorm: torch.Tensor
    log_g: torch.Tensor
    mark: torch.Tensor

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        max_tokens: int,
        num_q_heads: int,
        num_v_heads: int,
        head_dim: int,
        *,
        device: torch.device | str = "cuda",
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> GDNDraft:
        """Empty windows for a pool of `num_slots` states.

        Args:
            num_slots: slots of the pool the draft goes with.
            max_tokens: the longest window, in tokens.
            num_q_heads, num_v_heads: HQ and HV.
            head_dim: DK, and DV unless `head_dim_v` is given.
            device: where the pool is.
            head_dim_v: DV.
            dtype: of the recorded keys. float32 holds any key; bfloat16 and float16 need half the
                memory and keys of that very dtype.

        Raises:
            InvalidCall: a size is not an integer or too small, HV is no multiple of HQ, or the
                dtype is none of the three.
        """
        sizes = {
            "num_slots": num_slots,
            "max_tokens": max_tokens,
            "num_q_heads": num_q_heads,
            "num_v_heads": num_v_heads,
            "head_dim": head_dim,
            "head_dim_v": head_dim if head_dim_v is None else head_dim_v,
        }
        for name, size in sizes.items():
            least = 0 if name == "num_slots" else 1
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise invalid(name, f"an integer of at least {least}", repr(size))
        if max_tokens > MAX_TOKENS:
            raise invalid("max_tokens", f"at most {MAX_TOKENS}", max_tokens)
        if num_v_heads % num_q_heads != 0:
            raise invalid("num_v_heads", f"a multiple of {num_q_heads}", num_v_heads)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise invalid("dtype", "float32, bfloat16 or float16", dtype)
        P, W, HQ, HV, DK, DV = sizes.values()
        return cls(
            u=torch.empty(P, W, HV, DV, dtype=torch.float32, device=device),
            k=torch.empty(P, 2, W, HQ, DK, dtype=dtype, device=device),
            k_rnorm=torch.empty(P, 2, W, HQ, dtype=torch.float32, device=device),
            log_g=torch.empty(P, 2, W, HV, dtype=torch.float32, device=device),
            mark=torch.zeros(P, HV, DV, dtype=torch.int16, device=device),
        )

    @property
    def max_tokens(self) -> int:
        """The longest window."""
        return self.u.shape[1]

    @property
    def count(self) -> torch.Tensor:
        """Tokens in each slot's open window, int32 [slots]."""
        return (self.mark[:, 0, 0] >> 1).int()

    def flush(
        self,
        state: torch.Tensor,
        num_accepted: torch.Tensor,
        state_indices: torch.Tensor | None = None,
        state_layout: str = "vk",
        *,
        backend: str = "auto",
    ) -> None:
        """Folds the first num_accepted[B] tokens of each window into `state`; empties the windows.

        Afterwards `state` alone is the accepted prefix: copy it, crop it, or go on with
        `gdn_decode`. With num_accepted 0 the window is dropped and the state left as it is, which
        is also how a slot is made ready for another sequence. It is `gdn_verify` of no tokens.

        Args:
            state: the pool, [slots, HV, DV, DK] or with state_layout="kv" [slots, HV, DK, DV].
            num_accepted: int32 or int64 [B], clamped to the window's length.
            state_indices: int32 or int64 [B]; negative is padding; None names slot b for row b.
            state_layout: "vk" or "kv".
            backend: "auto" or the name of one.

        Raises:
            InvalidCall: an argument does not fit; nothing was written.
        """
        for name, x in (("state", state), ("num_accepted", num_accepted)):
            if not isinstance(x, torch.Tensor):
                raise invalid(name, "a tensor", repr(x))
        if state_indices is not None and not isinstance(state_indices, torch.Tensor):
            raise invalid("state_indices", "a tensor or None", repr(state_indices))
        if num_accepted.dim() != 1:
            raise invalid("num_accepted", "shape [B]", list(num_accepted.shape))
        B = num_accepted.shape[0]
        HQ, DK = self.k.shape[3:]
        HV, DV = self.u.shape[2:]
        q = self.k.new_empty(B, 0, HQ, DK)
        v = self.k.new_empty(B, 0, HV, DV)
        no_gates = [self.u.new_empty(B, 0, HV)] * 2
        op.verify(
            q, q, v, no_gates, state, *self.tensors, num_accepted, state_indices,
            torch.empty_like(v), 1.0, True, state_layout, backend,
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """u, k, k_rnorm, log_g, mark."""
        return self.u, self.k, self.k_rnorm, self.log_g, self.mark
