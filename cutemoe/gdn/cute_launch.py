"""From a validated call to a launch of the CuTe kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from cutemoe.errors import Unsupported
from cutemoe.gdn.cute_build import build
from cutemoe.gdn.cute_plan import Config
from cutemoe.gdn.problem import Problem
from cutemoe.gdn.tensors import GDNTensors
from cutemoe.runtime import replay
from cutemoe.runtime.compile import compiled

kernel = compiled(build)
_NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int32: "int32",
    torch.int64: "int64",
}


def run(problem: Problem, config: Config, x: GDNTensors) -> None:
    """Runs `gdn_decode` or `gdn_verify` on the tensors x; see cutemoe.gdn.reference.

    Raises:
        Unsupported: the tokens of one sequence or the rows of one head lie 2^31 elements apart.
        InvalidCall: the kernel is not compiled yet and a CUDA graph is being captured.
    """
    if problem.B == 0 or (problem.T == 0 and x.draft is None):
        return
    _check_reach(x)
    group = problem.HV // problem.HQ
    magic = -(-65536 // group)
    snapshots = x.intermediate_states
    if x.intermediate_indices is not None:
        snapshots = x.intermediate_indices
    replay.call(
        kernel(complete(config, x)), (x.q, x.k, x.v, x.out), x.gates, x.state, x.state_indices,
        snapshots, None if x.draft is None else tuple(x.draft), x.num_accepted, x.scale, group,
        magic,
    )  # fmt: skip


def complete(config: Config, x: GDNTensors) -> Config:
    """The configuration with what only the tensors show: dtypes and alignments."""
    state = [x.state] if x.intermediate_states is None else [x.state, x.intermediate_states]
    rows = [x.v, x.out]
    size = x.state.element_size()
    records = True
    if x.draft is not None:
        records = x.draft.k.data_ptr() % 16 == 0
        if x.draft.u.data_ptr() % 16 != 0 or x.v.shape[-1] % 4 != 0:
            rows = []
    vec = 16 // size if config.layout == "vk" else 4
    wide = (
        _aligned(min(16, vec * x.q.element_size()), x.q, x.k),
        bool(rows) and _aligned(4 * x.v.element_size(), *rows),
        _aligned(16 if config.layout == "vk" else 2 * size, *state),
        records,
    )
    index, accepted, targets = (
        "" if i is None else _NAMES[i.dtype]
        for i in (x.state_indices, x.num_accepted, x.intermediate_indices)
    )
    gates = tuple([_NAMES[g.dtype] for g in x.gates])
    return _completed(config, gates, index, accepted, targets, wide)


@lru_cache(maxsize=1024)
def _completed(
    config: Config,
    gates: tuple[str, ...],
    index: str,
    accepted: str,
    targets: str,
    wide: tuple[bool, bool, bool, bool],
) -> Config:
    return replace(
        config,
        gates=gates,
        index=index,
        accepted=accepted,
        targets=targets,
        wide=wide,
        # scalar accesses need more registers than a cap leaves
        blocks=config.blocks if all(wide) else 0,
    )


def _aligned(nbytes: int, *tensors: torch.Tensor) -> bool:
    """Every row of the tensors starts at a multiple of nbytes."""
    for x in tensors:
        size = x.element_size()
        if x.data_ptr() % nbytes or any(s * size % nbytes for s in x.stride()[:-1]):
            return False
    return True


def _check_reach(x: GDNTensors) -> None:
    """The kernel computes offsets within a sequence and within a state in 32 bits."""
    named: list[tuple[str, Any, int]] = [
        ("q", x.q, 1), ("k", x.k, 1), ("v", x.v, 1), ("out", x.out, 1), ("state", x.state, 2),
        ("intermediate_states", x.intermediate_states, 3),
    ]  # fmt: skip
    named += [(f"gates[{i}]", g, 1) for i, g in enumerate(x.gates[:2])]
    for name, t, dim in named:
        if t is not None and t.shape[dim] * t.stride(dim) >= 2**31:
            raise Unsupported(
                f"{name}: back end 'cute' takes rows less than 2^31 elements apart in all, got "
                f"strides {tuple(t.stride())} (use backend='triton')"
            )
