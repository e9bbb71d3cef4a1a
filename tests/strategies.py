"""What the properties draw: seeds, sizes, routing, and tensors made from a seed.

Runtime values (tokens, routing, indices, seeds) are drawn freely, compile-time values from short
lists of the test. Tensors come from a drawn seed, never element by element.

    @settings(max_examples=examples(0.5))
    @given(seed=seeds(), r=routings())
    def test_something(seed, r): ...
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st

import cutemoe
from cutemoe.formats import FORMATS


def examples(share: float) -> int:
    """That share of the examples of the current profile, at least one: for slow properties."""
    return max(1, round(share * settings.default.max_examples))  # type: ignore[union-attr]


def seeds() -> st.SearchStrategy[int]:
    """A seed for `generator`."""
    return st.integers(0, 2**31 - 1)


def multiples(step: int, most: int, least: int | None = None) -> st.SearchStrategy[int]:
    """Multiples of `step` up to `most` steps; from one step on, unless `least` steps says more."""
    return st.integers(1 if least is None else least, most).map(lambda n: n * step)


def leading(most: int = 3, dims: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Leading dimensions of a tensor, possibly none, possibly empty."""
    return st.lists(st.integers(0, most), max_size=dims).map(tuple)


def generator(seed: int) -> torch.Generator:
    """A CPU generator; every tensor of a test comes from one."""
    return torch.Generator().manual_seed(seed)


def normal(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> torch.Tensor:
    """Normal values, rounded to dtype."""
    return (torch.randn(shape, generator=generator(seed)) * scale).to(dtype)


def integers(
    shape: tuple[int, ...], seed: int, limit: int = 8, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Integers in [-limit, limit]: with power-of-two scales every sum of products is exact."""
    return torch.randint(-limit, limit + 1, shape, generator=generator(seed)).to(dtype)


def random_bytes(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """uint8, every value."""
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


def powers_of_two(shape: tuple[int, ...], seed: int, low: int = -1, high: int = 1) -> torch.Tensor:
    """float32 2^n with n in [low, high]."""
    return torch.exp2(torch.randint(low, high + 1, shape, generator=generator(seed)).float())


def exact_quantized(
    format: str, shape: tuple[int, ...], seed: int, *, group_size: int | None = None
) -> cutemoe.QuantizedTensor:
    """Random codes (no NaN) with scales 2^-1, 1 or 2: a GEMM with `integers` is order-free."""
    f = FORMATS[format]
    *lead, k = shape
    if not f.group_sizes:
        data = integers((*lead, k), seed, 8, torch.float32).to(f.data_dtype)
        return cutemoe.QuantizedTensor(data, powers_of_two((*lead,), seed + 1), format=format)
    group = group_size or f.group_sizes[0]
    data = random_bytes((*lead, k // 2), seed)
    scale = powers_of_two((*lead, k // group), seed + 1)
    if f.scale_dtype == torch.uint8:
        stored = (127 + torch.log2(scale)).to(torch.uint8)
    else:
        stored = scale.to(f.scale_dtype)
    return cutemoe.QuantizedTensor(data, stored, format=format, group_size=group)


PATTERNS = ("uniform", "skewed", "one expert", "skips", "all skipped")


@dataclass(frozen=True)
class Routing:
    """T tokens, each to K of E local experts. Ids outside [offset, offset + E) are skipped slots.

    Patterns: uniform; skewed (few experts take most tokens); one expert in slot 0 of every token;
    skips (a third of the slots out of range: -1, offset - 1, offset + E, large); all skipped.
    """

    T: int
    K: int
    E: int
    offset: int
    pattern: str
    seed: int

    def ids(self, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """[T, K], distinct experts within a token."""
        g = generator(self.seed)
        logits = torch.randn(self.T, self.E, generator=g)
        if self.pattern == "skewed":
            logits = logits - 3.0 * torch.arange(self.E)
        if self.pattern == "one expert":
            logits[:, self.seed % self.E] = torch.inf
        local = logits.topk(self.K, dim=-1).indices
        ids = local + self.offset
        if self.pattern in ("skips", "all skipped"):
            outside = torch.tensor([-1, self.offset - 1, self.offset + self.E, 2**31 - 1])
            # offset - 1 is -1 at offset 0 and a foreign expert elsewhere: never a local one
            pick = outside[torch.randint(0, 4, ids.shape, generator=g)]
            skip = torch.rand(ids.shape, generator=g) < (1 / 3 if self.pattern == "skips" else 2)
            ids = torch.where(skip, pick, ids)
        return ids.to(dtype)

    def weights(self, *, exact: bool = False) -> torch.Tensor:
        """float32 [T, K]: positive with sum 1, or powers of two for exact tests."""
        if exact:
            return powers_of_two((self.T, self.K), self.seed + 1, -2, 1)
        return torch.softmax(torch.randn(self.T, self.K, generator=generator(self.seed + 1)), -1)


@st.composite
def routings(
    draw: st.DrawFn, most_tokens: int = 40, most_experts: int = 9, most_k: int = 4
) -> Routing:
    """Routing of 0 to `most_tokens` tokens, every pattern."""
    E = draw(st.integers(1, most_experts))
    return Routing(
        T=draw(st.integers(0, most_tokens)),
        K=draw(st.integers(1, min(E, most_k))),
        E=E,
        offset=draw(st.sampled_from((0, 0, 3))),
        pattern=draw(st.sampled_from(PATTERNS)),
        seed=draw(seeds()),
    )
