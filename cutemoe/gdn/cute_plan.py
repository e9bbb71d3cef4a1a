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
    gates: tuple[str, ...] = ("bfloat16", "bfloat16", "float32", "float32")
    index: str = "int32"
    accepted: str = ""
    targets: str = ""
    wide: tuple[bool, bool, bool, bool] = (True, True, True, True)

    @property
    def rows(self) -> int:
        """Rows of a state that a warp has."""
        return 8 if self.tile == 1 else 16


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
    number of accepted tokens; perf/notes/gdn.md has every figure). Room for 12 warps an SM gains
    another 8 % for tiles of 4 tokens with float32 states, T=4 at B=256 344 -> 306 us in all. Tiles
    of 8 tokens are slower with it, 360 against 332 us, and bfloat16 states, 9 to 13 % faster, need
    8 to 40 bytes of local memory. ptxas spills for sm_80, sm_120a and rows
    left over too; asked for 8 warps on sm_80, it does not.
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
    blocks = 0
    if p.window is not None and p.T > 0:
        warps = 1
        fits = (tile, p.state, p.layout, p.DV % 16) == (4, "float32", "vk", 0)
        fits = fits and p.dtype != "float32"
        blocks = 8 if device.arch < 90 else 12 if fits and device.arch == 90 else 0
    return Config(
        dk=p.DK,
        tile=tile,
        loop=p.T == 0 or tile < p.T,
        warps=warps,
        blocks=blocks,
        io=p.dtype,
        state=p.state,
        layout=p.layout,
        ragged=p.DV % (rows * warps) != 0,
        l2norm=p.qk_l2norm,
        update=p.update,
        snapshots=p.snapshots,
        record=p.record or "",
    )
