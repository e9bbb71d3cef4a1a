"""Calls of the gated delta net, and an oracle that shares no code with the package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st

import cutemoe
from tests import strategies as draw

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# HQ, HV, DK, DV
SHAPES = ((1, 1, 8, 8), (1, 2, 16, 4), (2, 4, 6, 3), (1, 1, 40, 20))
# of the same heads, what CuTe takes
CUTE_SHAPES = ((1, 1, 64, 64), (1, 2, 128, 64), (2, 6, 64, 48), (1, 4, 128, 20))
# what every back end takes
NATIVE = ((1, 2, 128, 128), (2, 2, 64, 64))


@dataclass(frozen=True)
class Target:
    """A back end on a device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    def available(self) -> None:
        """Skips the test where the back end does not run on the device at all."""
        for r in cutemoe.backends("gdn_decode", self.device):
            if r.name == self.backend and r.reason is not None:
                pytest.skip(r.reason)

    def fit(self, case: Case) -> Case:
        """The case with head sizes that the back end takes; Triton and torch take any."""
        if self.backend != "cute" or case.shape not in SHAPES:
            return case
        return replace(case, shape=CUTE_SHAPES[SHAPES.index(case.shape)])

    def put(self, x: Any) -> Any:
        """A tensor, or the tensors of a dict, on the device."""
        if isinstance(x, dict):
            return {k: self.put(v) for k, v in x.items()}
        return x.to(self.device) if isinstance(x, torch.Tensor) else x

    def decode(self, **kwargs: Any) -> torch.Tensor:
        """`gdn_decode`; skips the test where the back end refuses the call, with its reason."""
        return self._call(cutemoe.gdn_decode, kwargs)

    def verify(self, **kwargs: Any) -> torch.Tensor:
        """`gdn_verify`; skips the test where the back end refuses the call, with its reason."""
        return self._call(cutemoe.gdn_verify, kwargs)

    def _call(self, function: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        try:
            return function(**kwargs, backend=self.backend)
        except cutemoe.Unsupported as e:
            pytest.skip(str(e))


@dataclass(frozen=True)
class Case:
    """What a call is drawn from; `call` makes the tensors."""

    B: int = 2
    T: int = 3
    shape: tuple[int, int, int, int] = (1, 2, 16, 8)
    dtype: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    layout: str = "vk"
    raw: bool = True
    l2norm: bool = True
    index: torch.dtype | None = torch.int32
    spare: int = 2
    seed: int = 0

    def __str__(self) -> str:
        return f"B{self.B}-T{self.T}-{self.shape}-{self.dtype}-{self.state}-{self.layout}"

    def rows(self) -> tuple[int, int]:
        """Last two dimensions of a state."""
        _, _, DK, DV = self.shape
        return (DV, DK) if self.layout == "vk" else (DK, DV)

    def slots(self) -> int:
        return self.B + self.spare

    def call(self) -> dict[str, Any]:
        """Keyword arguments of `gdn_decode` on the CPU."""
        HQ, HV, DK, DV = self.shape
        B, T, seed = self.B, self.T, self.seed
        normal = draw.normal
        call: dict[str, Any] = {
            "q": normal((B, T, HQ, DK), seed, self.dtype),
            "k": normal((B, T, HQ, DK), seed + 1, self.dtype),
            "v": normal((B, T, HV, DV), seed + 2, self.dtype),
            "state": normal((self.slots(), HV, *self.rows()), seed + 3, self.state),
            "qk_l2norm": self.l2norm,
            "state_layout": self.layout,
        }
        if not self.l2norm:
            call["scale"] = 0.25
            call["k"] = (call["k"] * DK**-0.5).to(self.dtype)
        a, b = normal((B, T, HV), seed + 4, self.dtype), normal((B, T, HV), seed + 5, self.dtype)
        if self.raw:
            call |= {"a": a, "b": b, "A_log": normal((HV,), seed + 6)}
            call["dt_bias"] = normal((HV,), seed + 7, torch.bfloat16)
        else:
            call |= {"g": -a.float().abs(), "beta": b.sigmoid()}
        if self.index is not None:
            order = torch.randperm(self.slots(), generator=draw.generator(seed + 8))
            call["state_indices"] = order[:B].to(self.index)
        return call

    def snapshots(self, steps: int | None = None) -> torch.Tensor:
        """Empty intermediate states, NaN."""
        shape = (self.B, self.T if steps is None else steps, self.shape[1], *self.rows())
        return torch.full(shape, torch.nan, dtype=self.state)

    def draft(self, max_tokens: int, device: str, dtype: torch.dtype = torch.float32) -> Any:
        """Empty windows for the pool of `call`."""
        HQ, HV, DK, DV = self.shape
        return cutemoe.GDNDraft.allocate(
            self.slots(), max_tokens, HQ, HV, DK, head_dim_v=DV, dtype=dtype, device=device
        )

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


@st.composite
def cases(draw_: st.DrawFn, shapes: Any = SHAPES, **fixed: Any) -> Case:
    """Any case; `fixed` holds the fields a test does not want drawn."""
    fields: dict[str, Any] = {
        "B": st.integers(0, 2),
        "T": st.integers(0, 3),
        "shape": st.sampled_from(shapes),
        "dtype": st.sampled_from(FLOATS),
        "state": st.sampled_from(FLOATS),
        "layout": st.sampled_from(("vk", "kv")),
        "raw": st.booleans(),
        "l2norm": st.booleans(),
        "index": st.sampled_from((None, torch.int32, torch.int64)),
        "spare": st.integers(0, 2),
        "seed": draw.seeds(),
    }
    return Case(**{k: fixed[k] if k in fixed else draw_(v) for k, v in fields.items()})


class Answer(NamedTuple):
    """out [B, T, HV, DV], and the state after every token [B, T, HV, DV, DK]."""

    out: torch.Tensor
    states: torch.Tensor


def gates_of(call: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Decay and beta [B, T, HV]."""
    if "g" in call:
        return call["g"].to(dtype).exp(), call["beta"].to(dtype)
    x = call["a"].to(dtype) + call["dt_bias"].to(dtype)
    soft = torch.where(x > 20, x, torch.log1p(x.clamp(max=20).exp()))
    return (-call["A_log"].to(dtype).exp() * soft).exp(), call["b"].to(dtype).sigmoid()


def oracle(call: dict[str, Any], dtype: torch.dtype = torch.float64) -> Answer:
    """The recurrence, one sequence, head and token at a time; every row is live."""
    q, k, v, pool = (call[n].to(dtype) for n in ("q", "k", "v", "state"))
    if call.get("state_layout", "vk") == "kv":
        pool = pool.transpose(-1, -2)
    (B, T, HQ, DK), (HV, DV) = q.shape, v.shape[2:]
    g, beta = gates_of(call, dtype)
    slots = call.get("state_indices")
    slots = torch.arange(B) if slots is None else slots.cpu()
    scale = call.get("scale") or DK**-0.5
    out, states = torch.zeros(B, T, HV, DV, dtype=dtype), torch.zeros(B, T, HV, DV, DK, dtype=dtype)
    for b in range(B):
        for h in range(HV):
            S = pool[int(slots[b]), h]
            for t in range(T):
                x_q, x_k = q[b, t, h // (HV // HQ)], k[b, t, h // (HV // HQ)]
                if call.get("qk_l2norm", True):
                    x_q = x_q / (x_q.square().sum() + 1e-6).sqrt()
                    x_k = x_k / (x_k.square().sum() + 1e-6).sqrt()
                S = g[b, t, h] * S
                u = beta[b, t, h] * (v[b, t, h] - (S * x_k).sum(-1))
                S = S + u[:, None] * x_k
                out[b, t, h], states[b, t, h] = (S * x_q).sum(-1) * scale, S
    return Answer(out, states)


def torch_path(call: dict[str, Any], device: str) -> Answer:
    """The recurrence in float32 with torch's roundings: per value the worse of CPU and `device`.

    Of one sum of a few values, the one order that a CPU takes can be off by next to nothing.
    """
    want, here = oracle(call), oracle(call, torch.float32)
    moved = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in call.items()}
    there = oracle(moved, torch.float32)
    return Answer(*(
        torch.where((a - w).abs() >= (b - w).abs(), a, b)
        for a, b, w in zip(here, there, want, strict=True)
    ))  # fmt: skip


def vk(x: torch.Tensor, case: Case) -> torch.Tensor:
    """States with rows along V."""
    return x if case.layout == "vk" else x.transpose(-1, -2)


def live_slots(call: dict[str, Any]) -> list[int]:
    """The slots a call names."""
    index = call.get("state_indices")
    return list(range(call["q"].shape[0])) if index is None else index.tolist()
