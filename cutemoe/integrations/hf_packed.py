"""Packed: the quantized weights of one expert layer of transformers, as a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cutemoe import PreparedMoE, QuantizedTensor, prepare_moe
from cutemoe.integrations.hf_gate import Activation


class Packed(nn.Module):
    """The weights of one layer, in place of its dense parameters.

    They move with the model (`.to`, `.cuda`) and never change dtype, are copied by deepcopy, count
    in the memory footprint as buffers, and stand in a state dict, under this module's name, as in
    gpt-oss checkpoints: `<weight>_blocks` uint8 [E, N, K/group, group/2], `<weight>_scales`
    [E, N, K/group], nvfp4's `<weight>_global_scale` [E], and `<weight>_bias`.

    Args:
        moe: the weights.
        activation: what the layer computes between its two products.
        names: what the layer called its parameters: w13, b13, w2, b2.
        dtype: what they were stored in.
    """

    def __init__(
        self, moe: PreparedMoE, activation: Activation, names: tuple[str, ...], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.activation, self.names, self.dtype = activation, names, dtype
        self.hold(moe)

    def hold(self, moe: PreparedMoE) -> None:
        """Puts other weights in place of those held."""
        self.moe = moe
        for name, weight in (("w13", moe.w13), ("w2", moe.w2)):
            self.register_buffer(f"{name}_data", weight.data, persistent=False)
            self.register_buffer(f"{name}_scale", weight.scale, persistent=False)

    def dense(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Weights [E, N, K] and biases by parameter name, rounded once to dtype."""
        weights = {name: q.dequantize(dtype) for name, q in self._weights()}
        return weights | {name: b.to(dtype) for name, b in self._biases()}

    def extra_repr(self) -> str:
        """The weights in one line."""
        return repr(self.moe)

    def _apply(self, fn: Any, recurse: bool = True) -> Packed:
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.moe.device)).device
        if device != self.moe.device:
            self.hold(self.moe.to(device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: t for name, t in self._stored().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        held = {prefix + name: t for name, t in self._stored().items()}
        given = {name for name in state_dict if name.startswith(prefix)}
        missing_keys += sorted(held.keys() - given)
        unexpected_keys += sorted(given - held.keys())
        wrong = [
            f"{name}: expected {held[name].dtype} {list(held[name].shape)}, "
            f"got {state_dict[name].dtype} {list(state_dict[name].shape)}"
            for name in sorted(given & held.keys())
            if state_dict[name].shape != held[name].shape
            or state_dict[name].dtype != held[name].dtype
        ]
        error_msgs += wrong
        if not wrong:
            new = {name: state_dict.get(name, t) for name, t in held.items()}
            self._restore({name[len(prefix) :]: t for name, t in new.items()})

    def _weights(self) -> Iterator[tuple[str, QuantizedTensor]]:
        for name, weight in ((self.names[0], self.moe.w13), (self.names[2], self.moe.w2)):
            yield name, weight.unpack()  # type: ignore[reportReturnType]

    def _biases(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, bias in ((self.names[1], self.moe.b13), (self.names[3], self.moe.b2)):
            if bias is not None:
                yield name, bias

    def _stored(self) -> dict[str, torch.Tensor]:
        stored = {name: b.to(self.dtype) for name, b in self._biases()}
        for name, q in self._weights():
            stored[f"{name}_blocks"] = q.data.unflatten(-1, (q.scale.shape[-1], -1))
            stored[f"{name}_scales"] = q.scale
            if q.global_scale is not None:
                stored[f"{name}_global_scale"] = q.global_scale
        return stored

    @torch.no_grad()
    def _restore(self, stored: dict[str, torch.Tensor]) -> None:
        stored = {name: t.to(self.moe.device, copy=True) for name, t in stored.items()}
        weights = []
        for name, old in self._weights():
            blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
            factor = stored.get(f"{name}_global_scale")
            weights.append(QuantizedTensor(blocks.flatten(-2), scales, factor, format=old.format))
        _, b13, _, b2 = self.names
        old = self.moe
        new = prepare_moe(
            weights[0],
            weights[1],
            stored.get(b13),
            stored.get(b2),
            activations=old.activations,
            gate_up=old.gate_up,
            backend=old.backend,
        )
        self.hold(replace(new, input_scale1=old.input_scale1, input_scale2=old.input_scale2))
