"""transformers models of real layer sizes, random weights: their own kernels against cutemoe's.

`python perf/hf_check.py` builds a few layers of gpt-oss-20b and Qwen3-Next on the GPU, no download,
and prints one json line for each comparison: tokens of generate(), errors of the logits against
float32, tokens a second. `--tiny --device cpu` runs the same code on small layers. The exit code
is 1 if errors are over the bound, twice those of the torch path in the same dtype, plus one ulp, or
if tokens differ that must not.

Tokens of random models differ where two tokens, or the last expert chosen and the next one, are
closer than the roundings of either model. A step is decided if in the float32 model the best token
leads by more than twice the largest error of the unmodified model at that step: tokens must be
equal up to a row's first undecided step. Each first difference is printed with its gap and errors,
and beside our count of equal rows that of transformers' own implementations of experts.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import torch
import transformers
from hf_case import build

from cutemoe import InvalidCall
from cutemoe.integrations import hf

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Seen:
    """What one model did: tokens [B, N] and, along the unmodified greedy path, logits [B, N, V]."""

    greedy: torch.Tensor
    sampled: torch.Tensor
    logits: torch.Tensor


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python perf/hf_check.py", description=__doc__)
    p.add_argument("--models", default="gpt_oss,qwen3_next", help="a,b,...")
    p.add_argument("--dtypes", default="bf16,fp16", help="of the dense models, a,b,...")
    p.add_argument("--formats", default="mxfp4", help="of quantized experts: mxfp4,nvfp4,int4")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--vocabulary", type=int, default=1024)
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--prompt", type=int, default=48, help="tokens")
    p.add_argument("--new", type=int, default=32, help="tokens to generate")
    p.add_argument("--batch", type=int, default=4, help="prompts of a comparison")
    p.add_argument("--speed-batches", default="1,16", help="a,b,...; empty: no timing")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="small layers, for a CPU")
    p.add_argument("--commit", help="what to record; default: git's answer")
    p.add_argument("--out", type=Path, help="json lines file to append to")
    return p


def words(text: str) -> list[str]:
    """What commas separate."""
    return [word for word in text.split(",") if word]


class Report:
    """Prints json lines, keeps them in a file if asked, and remembers whether any check failed."""

    def __init__(self, out: Path | None, common: dict[str, Any]) -> None:
        self.out, self.common, self.failed = out, common, False

    def line(self, **values: Any) -> None:
        """One record."""
        self.failed |= False in (values.get("within_bound"), values.get("decided_equal"))
        text = json.dumps(self.common | values, default=str)
        print(text, flush=True)
        if self.out is not None:
            with self.out.open("a") as f:
                f.write(text + "\n")


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """What `build` is asked for."""
    names = ("layers", "vocabulary", "device", "tiny")
    return {name: getattr(args, name) for name in names}


def prompts(seed: int, batch: int, args: argparse.Namespace) -> torch.Tensor:
    """Random token ids [batch, prompt]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(0, args.vocabulary, (batch, args.prompt), generator=generator)
    return ids.to(args.device)


def generate(model: Any, ids: torch.Tensor, new: int, seed: int | None = None) -> torch.Tensor:
    """The tokens generate() appends; sampled where a seed is given."""
    if seed is not None:
        torch.manual_seed(seed)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=seed is not None,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :]


@torch.no_grad()
def logits_along(model: Any, ids: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """float32 logits [B, N, V] that choose each token of `path`, decoded one at a time."""
    out = model(ids, use_cache=True)
    parts = [out.logits[:, -1:].float()]
    for step in range(path.shape[1] - 1):
        token = path[:, step : step + 1]
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits.float())
    return torch.cat(parts, dim=1)


def see(model: Any, ids: torch.Tensor, new: int, path: torch.Tensor | None = None) -> Seen:
    """Lets a model generate, and follows `path` (by default its own greedy one)."""
    greedy = generate(model, ids, new)
    sampled = generate(model, ids, new, seed=7)
    return Seen(greedy, sampled, logits_along(model, ids, greedy if path is None else path))


def oracle(model: Any, ids: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """float32 logits along a path, of the same weights in float32 on transformers' plain loop."""
    wide = copy.deepcopy(model).float()
    wide.set_experts_implementation("eager")
    found = logits_along(wide, ids, path)
    del wide
    free()
    return found


def free() -> None:
    """Gives unused memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(peer: Seen, ours: Seen, want: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Errors of the logits against `want`, and how many rows of tokens are equal."""
    e_peer, e_ours = ((s.logits - want).abs() for s in (peer, ours))
    ulp = torch.finfo(dtype).eps * want.abs().clamp(min=torch.finfo(dtype).tiny)
    peaks = [float(e.max()) for e in (e_peer, e_ours)]
    means = [float(e.square().mean().sqrt()) for e in (e_peer, e_ours)]
    slack = float(ulp.square().mean().sqrt())
    within = bool(((e_ours - ulp).max() <= 2 * peaks[0]) & (means[1] <= 2 * means[0] + slack))
    sure = decided(peer, want)
    return {
        "decided_steps": f"{int(sure.sum())}/{sure.numel()}",
        "decided_equal": bool((~sure | (peer.greedy == ours.greedy)).all()),
        "greedy_rows_equal": f"{rows_equal(peer.greedy, ours.greedy)}/{len(want)}",
        "sampled_rows_equal": f"{rows_equal(peer.sampled, ours.sampled)}/{len(want)}",
        "first_differences": differences(peer, ours, want),
        "logits_rms": round(float(want.square().mean().sqrt()), 4),
        "max_error": {"transformers": peaks[0], "cutemoe": peaks[1]},
        "rms_error": {"transformers": means[0], "cutemoe": means[1]},
        "ratio": {"max": peaks[1] / peaks[0], "rms": means[1] / means[0]},
        "within_bound": within,
    }


def decided(peer: Seen, want: torch.Tensor) -> torch.Tensor:
    """bool [B, N]: steps before a row's first one that the roundings of `peer` could change."""
    error = (peer.logits - want).abs().amax(-1)
    best, second = want.topk(2, -1).values.unbind(-1)
    return (best - second > 2 * error).cummin(1).values


def rows_equal(a: torch.Tensor, b: torch.Tensor) -> int:
    """Rows of tokens that are the same."""
    return int((a == b).all(dim=1).sum())


def differences(peer: Seen, ours: Seen, want: torch.Tensor) -> list[dict[str, Any]]:
    """Where greedy rows part, with the gap between both choices in all three models."""
    found = []
    for row in range(len(want)):
        steps = (peer.greedy[row] != ours.greedy[row]).nonzero()
        if not len(steps):
            continue
        step = int(steps[0])
        a, b = int(peer.greedy[row, step]), int(ours.greedy[row, step])
        gaps = (x[row, step, a] - x[row, step, b] for x in (want, peer.logits, ours.logits))
        gap, gap_peer, gap_ours = (round(float(g), 5) for g in gaps)
        errors = ((s.logits - want)[row, step].abs().max() for s in (peer, ours))
        error_peer, error_ours = (round(float(e), 5) for e in errors)
        found.append(
            {"row": row, "step": step, "gap_float32": gap, "gap_transformers": gap_peer,
             "gap_cutemoe": gap_ours, "error_transformers": error_peer,
             "error_cutemoe": error_ours}
        )  # fmt: skip
    return found


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speed(model: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of generate() and milliseconds of a prompt, after one run to warm up."""
    ids = prompts(99, batch, args)
    generate(model, ids, 4)
    synchronize()
    start = time.perf_counter()
    generate(model, ids, 1)
    synchronize()
    first = time.perf_counter() - start
    start = time.perf_counter()
    generate(model, ids, args.new + 1)
    synchronize()
    rest = time.perf_counter() - start - first
    return {
        "batch": batch,
        "prompt_ms": round(first * 1e3, 3),
        "ms_per_step": round(rest / args.new * 1e3, 3),
        "tokens_per_s": round(batch * args.new / rest, 1),
    }


def speeds(report: Report, model: Any, what: dict[str, Any], args: argparse.Namespace) -> None:
    """A line of speed for each batch."""
    for batch in map(int, words(args.speed_batches)):
        report.line(check="speed", **what, **speed(model, batch, args))


def usable(model: Any, ids: torch.Tensor) -> Any:
    """The model on the first of transformers' own implementations that runs its dtype here."""
    for implementation in (model.get_experts_implementation()[""], "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        try:
            with torch.no_grad():
                model(ids[:, :4])
        except (RuntimeError, NotImplementedError) as error:
            print(f"{implementation} does not run {model.dtype}: {error}", file=sys.stderr)
        else:
            return model
    raise RuntimeError(f"no experts implementation of transformers runs {model.dtype}")


def own_rows(model: Any, ids: torch.Tensor, peer: Seen, new: int) -> dict[str, str]:
    """Rows of greedy tokens that transformers' other implementations of experts leave equal."""
    own, found = model.get_experts_implementation()[""], {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        if implementation == own:
            continue
        model.set_experts_implementation(implementation)
        try:
            tokens = generate(model, ids, new)
        except (RuntimeError, NotImplementedError) as error:
            print(f"{implementation} does not run {model.dtype}: {error}", file=sys.stderr)
        else:
            found[implementation] = f"{rows_equal(peer.greedy, tokens)}/{len(ids)}"
    model.set_experts_implementation(own)
    return found


def part_rows(model: Any, ids: torch.Tensor, peer: Seen, new: int) -> dict[str, dict[str, str]]:
    """What stays equal where cutemoe runs experts or gated delta nets alone.

    Rows of greedy tokens, and steps whose logits along the unmodified path have the same bits.
    """
    found = {}
    for part in ("experts", "gdn"):
        try:
            hf.patch(model, experts=part == "experts", gdn=part == "gdn")
        except InvalidCall:
            # the model has no such layers
            continue
        tokens = generate(model, ids, new)
        same = (logits_along(model, ids, peer.greedy) == peer.logits).all(dim=-1)
        hf.unpatch(model)
        found[part] = {
            "rows": f"{rows_equal(peer.greedy, tokens)}/{len(ids)}",
            "logits": f"{int(same.sum())}/{same.numel()}",
        }
    return found


def check_dense(report: Report, name: str, key: str, seed: int, args: argparse.Namespace) -> None:
    """Compares one dense model with itself on cutemoe."""
    ids, dtype = prompts(seed, args.batch, args), DTYPES[key]
    model = usable(build(name, seed, dtype, **sizes(args)), ids)
    what = {"model": name, "weights": f"dense {key}", "layers": args.layers, "seed": seed}
    own = model.get_experts_implementation()[""]
    timed = seed == 0 and key == "bf16"
    peer = see(model, ids, args.new)
    if timed:
        speeds(report, model, what | {"runs": f"transformers {own}"}, args)
    alone = own_rows(model, ids, peer, args.new)
    want = oracle(model, ids, peer.greedy)
    parts = part_rows(model, ids, peer, args.new)
    hf.patch(model)
    ours = see(model, ids, args.new, peer.greedy)
    found = compare(peer, ours, want, dtype) | {"parts_equal": parts}
    report.line(check="dense", **what, transformers=own, transformers_rows_equal=alone, **found)
    if timed:
        speeds(report, model, what | {"runs": "cutemoe"}, args)
    hf.unpatch(model)
    same = torch.equal(logits_along(model, ids, peer.greedy), peer.logits)
    report.line(check="unpatched", **what, bits_equal=same)
    del model
    free()


def check_quantized(report: Report, name: str, form: str, args: argparse.Namespace) -> None:
    """Compares a quantized model with transformers on its dequantized weights."""
    ids, dtype = prompts(0, args.batch, args), torch.bfloat16
    model = build(name, 0, dtype, **sizes(args))
    what = {"model": name, "weights": form, "layers": args.layers, "seed": 0}
    before = model.get_memory_footprint()
    synchronize()
    start = time.perf_counter()
    # 2880 is no whole number of int4's default groups of 128
    hf.quantize_experts_(model, form, group_size=64 if form == "int4" else None)
    synchronize()
    seconds = time.perf_counter() - start
    free()
    report.line(
        check="quantize",
        **what,
        seconds=round(seconds, 3),
        gb_before=round(before / 1e9, 3),
        gb_after=round(model.get_memory_footprint() / 1e9, 3),
    )
    plain = usable(hf.dequantize_experts_(copy.deepcopy(model)), ids)
    peer = see(plain, ids, args.new)
    del plain
    free()
    exact = hf.dequantize_experts_(copy.deepcopy(model), torch.float32)
    want = oracle(exact, ids, peer.greedy)
    del exact
    free()
    hf.patch(model)
    ours = see(model, ids, args.new, peer.greedy)
    report.line(check="quantized", **what, **compare(peer, ours, want, dtype))
    speeds(report, model, what | {"runs": "cutemoe"}, args)
    del model
    free()


def main() -> int:
    """Runs every check; a failed bound makes the exit code 1, an exception ends the run."""
    args = parser().parse_args()
    transformers.logging.set_verbosity_error()
    # the oracle's convolutions in float32 proper
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(args.device)
    report = Report(
        args.out,
        {
            "device": machine.device_name(device),
            "versions": machine.versions() | {"transformers": transformers.__version__},
            "commit": args.commit or machine.commit(),
            "date": machine.now(),
        },
    )
    for name in words(args.models):
        for key in words(args.dtypes):
            for seed in range(args.seeds):
                check_dense(report, name, key, seed, args)
        for form in words(args.formats):
            check_quantized(report, name, form, args)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
