"""What the CuTe kernel of the family runs, and the configuration it is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cutemoe.gdn.problem import Problem
from cutemoe.runtime.device import Device

HEADS = (64, 128)
MAX_GRID = 65535


@dataclass(frozen=True)
class Config:
    """Everything the kernel is compiled for.

    Attributes:
        dk: head size of q and k, 64 or 128.
        tile: tokens computed at once: 8 or 4 on tensor cores, 4 for float32 q and k, 1 beside them.
        loop: more tokens than a tile may come, or none.
        warps: warps a CTA, each with `rows` rows.
        blocks: CTAs an SM that the registers must allow; 0 leaves it to the compiler.
        io, state: dtype of q, k, v and out; of the pool.
        layout: "vk" or "kv".
        ragged: DV is no multiple of rows * warps.
        l2norm, update, snapshots: as in `gdn_decode`.
        record: dtype of the recorded keys; "" is decode.
        long: more recorded tokens than `fold_tile` may have been accepted.
        gates: dtypes of (a, b, A_log, dt_bias) or of (g, beta).
        index, accepted: dtypes of the slot indices and of num_accepted, "" for none.
        targets: dtype of the slots for the states after tokens, "" for none.
        wide: (q and k, v and out and u, states, recorded keys) are aligned for vectors.
    """

    dk: int = 128
    tile: int = 8
    loop: bool = False
    warps: int = 4
    blocks: int = 0
    io: str = "bfloat16"
    state: str = "float32"
    layout: str = "vk"
    ragged: bool = False
    l2norm: bool = True
    update: bool = True
    snapshots: bool = False
    record: str = ""
    long: bool = False
    gates: tuple[str, ...] = ("bfloat16", "bfloat16", "float32", "float32")
    index: str = "int32"
    accepted: str = ""
    targets: str = ""
    wide: tuple[bool, bool, bool, bool] = (True, True, True, True)

    @property
    def rows(self) -> int:
        """Rows of a state that a warp has."""
        return 8 if self.tile == 1 else 16


def fold_tile(dtype: str) -> int:
    """Recorded tokens that become part of a state at once, by the dtype of q and k."""
    return 4 if dtype == "float32" else 8


def refuse(problem: Problem, device: Device) -> str | None:
    """A warp holds 16 whole rows of a state in registers."""
    if problem.DK not in HEADS:
        return f"DK 64 or 128, got {problem.DK}"
    if problem.rounding != "fused":
        return f"rounding 'fused', got {problem.rounding!r}"
    if problem.DV < 2:
        return f"DV >= 2, got {problem.DV}"
    if max(problem.B, problem.HV) > MAX_GRID or problem.HV * problem.HV > problem.HQ << 16:
        return f"B <= {MAX_GRID} and HV * HV / HQ <= 65536, got B={problem.B}, HV={problem.HV}"
    return None


@lru_cache(maxsize=1024)
def configure(problem: Problem, device: Device) -> Config:
    """The configuration, but for the dtypes and alignments that only the tensors show.

    Token by token where there is one, or states are stored between: H200, 2026-11-30, T=4, states
    after every token, B = 1 / 4 / 16 / 64, us, and on tensor cores: float32 5.8 / 12.8 / 46 / 175
    and 6.1 / 14.0 / 47 / 184, bfloat16 4.6 / 8.5 / 27 / 93 and 4.4 / 8.4 / 25 / 91.

    Verification runs in CTAs of one warp: 1 to 7 % over four (H200, 2026-11-27, HV=32, a random
    number of accepted tokens; perf/notes/gdn.md has every figure). `_blocks` has the warps an SM.
    """
    p = problem
    tile = 4 if p.T <= 4 or p.dtype == "float32" else 8
    stored = (p.snapshots or p.scattered) and (p.state == "float32" or p.T > 4)
    if p.layout == "vk" and p.window is None and (p.T == 1 or stored):
        tile = 1
    rows = 8 if tile == 1 else 16
    most = 2 if p.layout == "vk" else 4
    if (tile, p.state) == (1, "float32") and p.T <= 2:
        most = 1
    warps = next((w for w in (4, 2, 1) if w <= most and p.DV % (rows * w) == 0), most)
    verify = p.window is not None and p.T > 0
    long = (p.window or 0) > fold_tile(p.dtype)
    warps = 1 if verify else warps
    return Config(
        dk=p.DK,
        tile=tile,
        loop=p.T == 0 or tile < p.T,
        warps=warps,
        blocks=_blocks(p, tile, long, device.arch) if verify else 0,
        io=p.dtype,
        state=p.state,
        layout=p.layout,
        ragged=p.DV % (rows * warps) != 0,
        l2norm=p.qk_l2norm,
        update=p.update,
        snapshots=p.snapshots,
        record=p.record or "",
        long=long,
    )


def _blocks(p: Problem, tile: int, long: bool, arch: int) -> int:
    """CTAs of a warp that shall fit an SM in verification, 0 where ptxas would spill for them.

    A random number of accepted tokens, HV=32, B=256, H200, 2026-12-01, us with and without being
    asked: float32 states T=4 276 and 337, T=8 321 and 370; bfloat16 T=4 169 and 178, T=8 200 and
    204. With 20 warps bfloat16 is 3 to 10 % slower where nothing is folded, and spills.
    """
    if arch < 90:
        # ptxas spills for sm_80 where nothing is asked of it
        return 8
    if arch != 90 or p.layout != "vk" or p.DV % 16 != 0 or not p.qk_l2norm:
        return 0
    if p.state == "float32":
        return 12 if p.dtype != "float32" and (tile == 4 or p.record == p.dtype) else 0
    return 16 if p.state == p.record == p.dtype == "bfloat16" and not long else 0
