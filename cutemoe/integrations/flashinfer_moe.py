"""FlashInfer's `b12x_fused_moe` and `B12xMoEWrapper` on the kernels of this package.

Same names, arguments and conventions, quant_mode "nvfp4" and "w4a16":

| argument | means here |
|---|---|
| w1_weight, w2_weight | codes [E, 2I, H/2] (ReLU2: [E, I, H/2]) and [E, H, I/2]; w1 has up rows, then gate rows |
| w1_weight_sf, w2_weight_sf | e4m3 scales in 128x4 blocks, [E, N/128, K/64, 32, 4, 4] or its view [32, 4, N/128, 4, K/64, E] |
| w1_alpha | [1] or [E]: divisor of x before its quantisation and multiplier of the FC1 sums |
| fc2_input_scale | [1] or [E]: the same divisor of the FC2 input |
| w2_alpha | [1] or [E]: multiplier of the FC2 sums |

So the multiplier of the weights is 1 for w1 and w2_alpha / fc2_input_scale for w2. In "w4a16" nothing
is quantised: both inputs are bf16, w1_alpha and w2_alpha multiply the sums, fc2_input_scale is None
or not read. It runs on the NVFP4 x BF16 back ends of `fused_moe`. Any intermediate size that is a multiple of 16 runs as it is: no weight is padded, copied or repointed.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from cutemoe import GeGLU, PreparedMoE, QuantizedTensor, ReLU2, SwiGLU, Workspace
from cutemoe import fused_moe as _fused_moe
from cutemoe import prepare_moe as _prepare_moe
from cutemoe.errors import invalid
from cutemoe.layouts import LAYOUTS

QUANT_MODES = {"nvfp4": "nvfp4", "w4a4": "nvfp4", "fp4": "nvfp4", "w4a16": "w4a16", "bf16": "w4a16"}


@dataclass(frozen=True)
class Options:
    """Further arguments of FlashInfer's functions, with its defaults.

    Attributes:
        swiglu_alpha, swiglu_beta, swiglu_limit: of activation "swigluoai_uninterleave".
        quant_mode, activation_precision: "nvfp4" ("w4a4", "fp4") or "w4a16" ("bf16"); the first
            wins where both are given.
        output_dtype: bf16.
        source_format, device: accepted; scales are in the conventions above whatever the source,
            and buffers live where x does.
    """

    swiglu_alpha: float = 1.702
    swiglu_beta: float = 1.0
    swiglu_limit: float | None = None
    quant_mode: str | None = None
    activation_precision: str = "fp4"
    output_dtype: torch.dtype = torch.bfloat16
    source_format: str = "modelopt"
    device: torch.device | str | None = None


def b12x_fused_moe(
    x: torch.Tensor,
    w1_weight: torch.Tensor,
    w1_weight_sf: torch.Tensor,
    w2_weight: torch.Tensor,
    w2_weight_sf: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor,
    num_experts: int,
    top_k: int,
    *,
    w1_alpha: torch.Tensor,
    w2_alpha: torch.Tensor,
    fc2_input_scale: torch.Tensor | None = None,
    num_local_experts: int | None = None,
    local_expert_offset: int = 0,
    output: torch.Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
    **options: Any,
) -> torch.Tensor:
    """The layer on x [T, H] bf16; prepares its weights at every call, `B12xMoEWrapper` once.

    Args:
        token_selected_experts, token_final_scales: ids of all experts and float32 weights [T, K].
        num_local_experts, local_expert_offset: the experts of the weights, by default all; slots of
            others are skipped.
        output: [T, H] bf16 to write to.
        activation: "silu", "gelu_tanh", "swigluoai_uninterleave" or "relu2".
        backend: as of `fused_moe`.
        options: see `Options`.

    Returns:
        output, or a new tensor: the sum over local experts, zero rows where a token has none.

    Raises:
        InvalidCall: a malformed argument.
        Unsupported: no back end runs the layer.
    """
    wrapper = B12xMoEWrapper(
        num_experts,
        top_k,
        x.shape[-1],
        2 * w2_weight.shape[-1],
        num_local_experts=num_local_experts,
        local_expert_offset=local_expert_offset,
        activation=activation,
        backend=backend,
        **options,
    )
    return wrapper.run(
        x,
        w1_weight,
        w1_weight_sf,
        w2_weight,
        w2_weight_sf,
        token_selected_experts,
        token_final_scales,
        w1_alpha=w1_alpha,
        w2_alpha=w2_alpha,
        fc2_input_scale=fc2_input_scale,
        output=output,
    )


class B12xMoEWrapper:
    """A layer with its scratch memory; keeps what it prepared from the last weights.

    The weights are prepared again when another tensor, or one that was written to since, comes. A
    tensor is known by being the same object, which the wrapper holds: no address is used twice.

    Args:
        use_cuda_graph: allocate output and scratch for max_num_tokens once; the output of `run` is
            then a part of a buffer of the wrapper, and runs can be captured after the first.
        intermediate_size, hidden_size, num_experts, top_k: checked against the tensors.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        use_cuda_graph: bool = False,
        max_num_tokens: int = 4096,
        num_local_experts: int | None = None,
        local_expert_offset: int = 0,
        activation: str = "silu",
        backend: str = "auto",
        **options: Any,
    ) -> None:
        self.local = num_experts if num_local_experts is None else num_local_experts
        if not 1 <= self.local <= num_experts - local_expert_offset or local_expert_offset < 0:
            want = f"1 to {num_experts} experts from local_expert_offset on"
            raise invalid("num_local_experts", want, f"{self.local} from {local_expert_offset}")
        unknown = set(options) - {f.name for f in fields(Options)}
        if unknown:
            known = ", ".join(f.name for f in fields(Options))
            raise invalid("options", f"any of {known}", ", ".join(sorted(unknown)))
        given = Options(**options)
        self.mode = _mode(given)
        self.activation = _activation(activation, given)
        self.top_k, self.hidden, self.intermediate = top_k, hidden_size, intermediate_size
        self.offset, self.backend = local_expert_offset, backend
        self.max_tokens = max_num_tokens if use_cuda_graph else None
        self._known: list[tuple[torch.Tensor | None, int]] = []
        self._moe: PreparedMoE | None = None
        self._buffers: tuple[Workspace, torch.Tensor] | None = None

    def run(
        self,
        x: torch.Tensor,
        w1_weight: torch.Tensor,
        w1_weight_sf: torch.Tensor,
        w2_weight: torch.Tensor,
        w2_weight_sf: torch.Tensor,
        token_selected_experts: torch.Tensor,
        token_final_scales: torch.Tensor,
        *,
        w1_alpha: torch.Tensor,
        w2_alpha: torch.Tensor,
        fc2_input_scale: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer on x [T, H]; arguments, result and exceptions as of `b12x_fused_moe`."""
        ids = token_selected_experts
        if x.dtype != torch.bfloat16:
            raise invalid("x", "bfloat16", x.dtype)
        if ids.ndim != 2 or ids.shape[1] != self.top_k:
            raise invalid("token_selected_experts", f"shape [T, {self.top_k}]", list(ids.shape))
        moe = self._prepared(
            w1_weight, w1_weight_sf, w2_weight, w2_weight_sf, w1_alpha, w2_alpha, fc2_input_scale
        )
        space = None
        if self.max_tokens is not None:
            space, buffer = self._allocated(moe, x)
            output = buffer[: x.shape[0]] if output is None else output
        return _fused_moe(
            x,
            moe,
            ids,
            token_final_scales,
            activation=self.activation,
            expert_offset=self.offset,
            out=output,
            workspace=space,
            backend=self.backend,
        )

    def _prepared(self, *tensors: torch.Tensor | None) -> PreparedMoE:
        """The layer of these tensors: the one at hand where they are those it was made from."""
        versions = [0 if t is None or t.is_inference() else t._version for t in tensors]
        same = len(self._known) == len(tensors) and all(
            t is old and version == seen
            for t, version, (old, seen) in zip(tensors, versions, self._known, strict=True)
        )
        if self._moe is None or not same:
            self._moe = self._prepare(*tensors)
            self._known = list(zip(tensors, versions, strict=True))
        return self._moe

    def _prepare(self, w1, sf1, w2, sf2, alpha1, alpha2, input2) -> PreparedMoE:  # type: ignore[no-untyped-def]
        if self.mode == "w4a16":
            # not read, whatever it is
            input2 = alpha2
        elif input2 is None:
            raise invalid("fc2_input_scale", "a tensor [1] or [E] for nvfp4", "None")
        rows = self.intermediate * (1 if isinstance(self.activation, ReLU2) else 2)
        first = _weight("w1_weight", w1, sf1, (self.local, rows, self.hidden))
        second = _weight("w2_weight", w2, sf2, (self.local, self.hidden, self.intermediate))
        d1, d2, a2 = (
            _per_expert(name, t, self.local)
            for name, t in (
                ("w1_alpha", alpha1),
                ("fc2_input_scale", input2),
                ("w2_alpha", alpha2),
            )
        )
        if self.mode == "w4a16":
            first = QuantizedTensor(first.data, first.scale, d1, format="nvfp4")
            second = QuantizedTensor(second.data, second.scale, a2, format="nvfp4")
            return _prepare_moe(first, second, gate_up="up_gate", backend=self.backend)
        second = QuantizedTensor(second.data, second.scale, a2 / d2, format="nvfp4")
        return _prepare_moe(
            first,
            second,
            activations="nvfp4",
            gate_up="up_gate",
            input_scale=(d1, d2),
            backend=self.backend,
        )

    def _allocated(self, moe: PreparedMoE, x: torch.Tensor) -> tuple[Workspace, torch.Tensor]:
        """Scratch and output for the most tokens."""
        most = self.max_tokens or 0
        if x.shape[0] > most:
            raise invalid("x", f"at most max_num_tokens = {most} rows", x.shape[0])
        if self._buffers is None or self._buffers[0].device != x.device:
            space = Workspace.for_moe(moe, most, self.top_k)
            self._buffers = space, torch.empty(most, self.hidden, dtype=x.dtype, device=x.device)
        return self._buffers


def _weight(
    name: str, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int, int]
) -> QuantizedTensor:
    """Codes [E, N, K/2] and scales in 128x4 blocks, with K/16 blocks a row."""
    experts, n, k = shape
    codes = codes.view(torch.uint8)
    if tuple(codes.shape) != (experts, n, k // 2):
        raise invalid(name, f"shape {[experts, n, k // 2]} of bytes", list(codes.shape))
    layout = LAYOUTS["sm120_block_scale"]
    blocks = (experts, n, k // 16)
    packed = tuple(layout.moved(blocks))
    _, m_tiles, k_tiles, *_ = packed
    scales = scales.view(torch.float8_e4m3fn)
    if tuple(scales.shape) == (32, 4, m_tiles, 4, k_tiles, experts):
        scales = scales.permute(5, 2, 4, 0, 1, 3)
    elif scales.shape[0] == experts and scales.numel() == torch.Size(packed).numel():
        scales = scales.reshape(packed)
    else:
        want = f"{list(packed)}, or [32, 4, {m_tiles}, 4, {k_tiles}, {experts}]"
        raise invalid(f"{name}_sf", want, list(scales.shape))
    return QuantizedTensor(codes, layout.unpack(scales, blocks), format="nvfp4")


def _per_expert(name: str, t: torch.Tensor, experts: int) -> torch.Tensor:
    """[1] or [E], any floating type -> float32 [E]."""
    if t.numel() not in (1, experts) or not t.dtype.is_floating_point:
        raise invalid(name, f"floating point, shape [1] or [{experts}]", list(t.shape))
    return t.detach().to(torch.float32).reshape(-1).expand(experts).contiguous()


def _activation(name: str, given: Options) -> SwiGLU | GeGLU | ReLU2:
    if name == "swigluoai_uninterleave":
        return SwiGLU(given.swiglu_alpha, given.swiglu_beta, given.swiglu_limit)
    known = {"silu": SwiGLU(), "gelu_tanh": GeGLU("tanh"), "relu2": ReLU2()}
    if name not in known:
        names = ", ".join(map(repr, (*known, "swigluoai_uninterleave")))
        raise invalid("activation", f"one of {names}", repr(name))
    return known[name]


def _mode(given: Options) -> str:
    """ "nvfp4" or "w4a16"."""
    asked = given.activation_precision if given.quant_mode is None else given.quant_mode
    mode = QUANT_MODES.get(asked)
    if mode is None:
        raise invalid("quant_mode", f"one of {', '.join(map(repr, QUANT_MODES))}", repr(asked))
    if given.output_dtype != torch.bfloat16:
        raise invalid("output_dtype", "torch.bfloat16", given.output_dtype)
    return mode
