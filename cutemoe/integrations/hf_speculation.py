"""Assisted generation on gated delta nets: a cache whose crop rolls the recurrent state back.

transformers refuses assisted generation on these models, because its cache cannot give a recurrent
state of before: `_is_stateful` in `generate`, and `crop` of the cache layers of linear attention.
Here the layer keeps the state of the accepted tokens and a `GDNDraft` of the tokens since: a
forward is `gdn_verify`, crop only notes how many tokens stay, and the next forward folds those into
the state while it reads it. The state of the convolution is rolled back by transformers' own crop.

Decision: a forward without a crop before it (the steps of a draft model) computes the open window
again, longer by its tokens, from their recorded inputs. That reads the state once, as decoding
does, and writes none. Rejected: a state a token (64 KB a head and token), which every step writes.

Decision: of a prompt, only the last `max_tokens` tokens are verified; the first go through the
chunked rule of transformers and are final, so that the memory does not grow with the prompt.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionLayer

from cutemoe import GDNDraft, gdn_verify
from cutemoe.errors import InvalidCall, invalid
from cutemoe.integrations import hf_gdn

MAX_DRAFT_TOKENS = 32
_PATCHED = ("_is_stateful", "_prepare_cache_for_generation", "_cutemoe_draft_tokens")
Inputs = tuple[torch.Tensor, ...]


class RollbackLayer(LinearAttentionLayer):
    """The cache of one gated delta net, of which up to `max_tokens` tokens can be cropped.

    Attributes:
        state: float32 [B, HV, DV, DK], the tokens that no crop can remove any more.
        draft: the open window of the last forward, the slot of a sequence its row.
        inputs: q, k, v, g and beta of the window, until a crop says how much of it stays.
        accepted: tokens of the window that stay.
        length: tokens of the window.
    """

    is_croppable = True  # pyright: ignore[reportAssignmentType]
    is_compileable = False  # pyright: ignore[reportAssignmentType]

    def __init__(self, inbox: hf_gdn.Inbox, max_tokens: int, backend: str) -> None:
        super().__init__()
        self.inbox, self.max_tokens, self.backend = inbox, max_tokens, backend
        self.record_past = True
        self.state: torch.Tensor | None = None
        self.draft: GDNDraft | None = None
        self.inputs: Inputs | None = None
        self.accepted = self.length = 0

    @classmethod
    def of(cls, old: LinearAttentionLayer, inbox: hf_gdn.Inbox, max_tokens: int, backend: str):
        """A layer that goes on from where another one is."""
        new = cls(inbox, max_tokens, backend)
        ours = ("inbox", "max_tokens", "backend", "state", "draft", "inputs", "accepted", "length")
        for name, value in vars(old).items():
            if name not in ours:
                setattr(new, name, value)
        new.record_past = True
        if (state := old.recurrent_states[0]) is not None:
            new._keep(state)
        return new

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """transformers' own; in every forward it comes before the rule, which finds this layer."""
        self.inbox.put(self)
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing: the rule has updated the state already."""
        if recurrent_states is not self.recurrent_states[0]:
            self.inbox.clear()
            raise InvalidCall(
                "cache: expected the model it was made for, patched; got one that is not "
                "(hf.patch(model) again, or start with a new cache)"
            )
        return recurrent_states

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
        beta: torch.Tensor, qk_l2norm: bool, chunked: Callable[..., Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """The rule over T more tokens: q, k [B, T, HQ, DK], v [B, T, HV, DV], g, beta [B, T, HV].

        Returns:
            The output [B, T, HV, DV], and what stands for the state in transformers' cache.
        """
        T = q.shape[1]
        new: Inputs = (q, k, v, g.float(), beta.float())
        accepted, head = self.accepted, max(T - self.max_tokens, 0)
        if self.inputs is not None:
            # nobody cropped: the window goes on, and what does not fit into it is final
            accepted = min(max(self.length + T - self.max_tokens, 0), self.length)
            if accepted < self.length:
                new = tuple(
                    torch.cat((old[:, accepted:], x), 1)
                    for old, x in zip(self.inputs, new, strict=True)
                )
        outs = []
        if head > 0:
            outs.append(
                self._prefill(tuple(x[:, :head] for x in new), accepted, qk_l2norm, chunked)
            )
            new, accepted = tuple(x[:, head:] for x in new), 0
        outs.append(self._verify(new, accepted, qk_l2norm)[:, -(T - head) :])
        self.inputs = new
        self.accepted = self.length = new[0].shape[1]
        return torch.cat(outs, 1) if head > 0 else outs[0], self.recurrent_states[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens; what is left is final."""
        removed = abs(tokens_to_remove)
        open_tokens = 0 if self.inputs is None else self.length
        if removed > open_tokens:
            raise invalid(
                "tokens_to_remove", f"at most the {open_tokens} tokens of the open window", removed,
                "hf.patch(model, max_draft_tokens=...) keeps a longer one",
            )  # fmt: skip
        super().crop(tokens_to_remove)
        if self.inputs is not None:
            self.inputs, self.accepted = None, open_tokens - removed

    def reset(self) -> None:
        """As new."""
        super().reset()
        self.state = self.draft = self.inputs = self.recurrent_states[0] = None
        self.is_recurrent_states_initialized[0] = False
        self.accepted = self.length = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused: assisted generation has no beams."""
        raise InvalidCall("beam_idx: expected no beam search over a cache of assisted generation")

    def offload(self) -> None:
        """Refused: the window lives beside the state."""
        raise InvalidCall("cache: expected a cache without offloading in assisted generation")

    def _keep(self, recurrent_state: torch.Tensor) -> None:
        """Takes a state [B, HV, DK, DV] of transformers over."""
        state = recurrent_state.float().transpose(-1, -2).contiguous()
        if self.state is None:
            self.state = state
            self.recurrent_states[0] = state.transpose(-1, -2)
            self.is_recurrent_states_initialized[0] = True
        else:
            self.state.copy_(state)

    def _prefill(self, new: Inputs, accepted: int, qk_l2norm: bool, chunked: Any) -> torch.Tensor:
        """The chunked rule over tokens no crop will remove, after the accepted ones."""
        if self.draft is not None and self.state is not None:
            self.draft.flush(self.state, self._count(accepted), backend=self.backend)
        q, k, v, g, beta = new
        before = self.recurrent_states[0]
        out, state = chunked(
            q, k, v, g=g, beta=beta.to(v.dtype),
            initial_state=None if before is None else before.contiguous(),
            output_final_state=True, use_qk_l2norm_in_kernel=qk_l2norm,
        )  # fmt: skip
        self._keep(state)
        return out

    def _verify(self, new: Inputs, accepted: int, qk_l2norm: bool) -> torch.Tensor:
        # the convolution leaves the tokens of a channel together
        q, k, v, g, beta = (x.contiguous() for x in new)
        B, _, HV, DV = v.shape
        HQ, DK = q.shape[2:]
        if self.state is None:
            self._keep(v.new_zeros(B, HV, DK, DV, dtype=torch.float32))
        if self.draft is None:
            self.draft = GDNDraft.allocate(
                B, self.max_tokens, HQ, HV, DK, device=v.device, head_dim_v=DV, dtype=k.dtype
            )
        state: Any = self.state
        return gdn_verify(
            q, k, v, state=state, draft=self.draft, num_accepted=self._count(accepted), g=g,
            beta=beta, qk_l2norm=qk_l2norm, backend=self.backend,
        )  # fmt: skip

    def _count(self, accepted: int) -> torch.Tensor:
        state: Any = self.state
        return torch.full((state.shape[0],), accepted, dtype=torch.int32, device=state.device)


def patch_model(model: PreTrainedModel, max_draft_tokens: int) -> None:
    """Lets `generate` accept an assistant, or be one, with caches that roll back."""
    model.__dict__["_is_stateful"] = False
    model.__dict__["_cutemoe_draft_tokens"] = max_draft_tokens
    model.__dict__["_prepare_cache_for_generation"] = types.MethodType(_prepare_cache, model)


def unpatch_model(model: PreTrainedModel) -> None:
    """Undoes `patch_model`."""
    for name in _PATCHED:
        model.__dict__.pop(name, None)


def make_croppable(model: PreTrainedModel, cache: Cache, max_tokens: int) -> None:
    """Replaces the layers of a cache that belong to patched gated delta nets of a model."""
    for name, net in hf_gdn.layers(model):
        at: Any = net.layer_idx
        old: Any = cache.layers[at]
        if isinstance(old, RollbackLayer):
            continue
        if type(old) is not LinearAttentionLayer or old.number_of_states != 1:
            raise invalid(f"cache.layers[{at}]", f"a LinearAttentionLayer for {name}", repr(old))
        inbox, backend = hf_gdn.inbox(net)
        cache.layers[at] = RollbackLayer.of(old, inbox, max_tokens, backend)


def _prepare_cache(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """transformers' own, whose cache can then be cropped where generation will crop it."""
    own = type(self)._prepare_cache_for_generation
    result = own(self, generation_config, model_kwargs, generation_mode, *args, **kwargs)
    assisted = getattr(generation_mode, "value", generation_mode) == "assisted_generation"
    if assisted or generation_config.is_assistant:
        for name in ("cache", "past_key_values"):
            if isinstance(cache := model_kwargs.get(name), Cache):
                make_croppable(self, cache, self._cutemoe_draft_tokens)
    return result
