"""The CuTe back end of NVFP4 and MXFP4 layers: what it refuses, where weights go, what it keeps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cutemoe
from cutemoe.gemm.plan import weight_layout
from cutemoe.gemm.weight import SM120, PackedWeight
from cutemoe.moe import api, cute_nvfp4_plan, plan
from cutemoe.moe.problem import Problem
from cutemoe.moe.workspace import (
    MIN_TILE_ROWS,
    WHOLE_Y,
    layout,
    max_tiles,
    y_bytes,
    y_parts,
)
from cutemoe.runtime.backend import choose, explain
from cutemoe.runtime.device import Device
from tests import strategies as draw
from tests.close import assert_same
from tests.moe.cases import FP4, SATURATED, Target, exact_layer, exact_x, random_layer
from tests.poison import Poison

pytest.importorskip("cutlass")
RTX = Device("cuda", 0, "RTX PRO 6000", 120, 188, 101376, True)
SPARK = replace(RTX, name="GB10", arch=121, sm_count=48)
H200 = Device("cuda", 0, "H200", 90, 132, 232448, True)
V100 = Device("cuda", 0, "V100", 70, 80, 98304, True)
GOOD = Problem(
    tokens=16, hidden=4096, intermediate=2048, experts=256, top_k=8, gated=True, weight="nvfp4",
    group_size=16, layout=SM120, activations="nvfp4", dtype="bf16", gate_up="up_gate",
    activation="swiglu", per_expert_params=True, has_limit=True, has_b13=True, has_b2=True,
    static_scale=True, ids="int32", expert_offset=0, deterministic=True, rounding="fused",
)  # fmt: skip
MXFP4 = replace(GOOD, weight="mxfp4", activations="mxfp4", group_size=32, static_scale=False)
W4A16 = replace(GOOD, activations="bf16", static_scale=False)
BOTH = pytest.mark.parametrize("format", FP4)
# weights and activations of the kernels
LAYERS = {"nvfp4": ("nvfp4", "nvfp4"), "mxfp4": ("mxfp4", "mxfp4"), "w4a16": ("nvfp4", "bf16")}
EACH = pytest.mark.parametrize("kind", LAYERS)
CUTE = next(b for b in plan.BACKENDS if b.name == "cute_nvfp4")
TRITON = next(b for b in plan.BACKENDS if b.name == "triton")


@pytest.mark.parametrize("device", [RTX, SPARK, H200], ids=str)
@pytest.mark.parametrize("change", [{}, {"top_k": 32, "experts": 1024}, {"tokens": 100_000}])
@pytest.mark.parametrize("good", [GOOD, MXFP4, W4A16], ids=LAYERS)
def test_what_is_promised_runs(good, change, device):
    problem = replace(good, **change)
    assert CUTE.reason(problem, device) is None
    assert choose("fused_moe", plan.BACKENDS, problem, device, "auto") is CUTE


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layout": "rows"}, "layout 'sm120_fp4', got 'rows' (prepare with backend='cute_nvf"),
        ({"weight": "mxfp4"}, "both mxfp4, or nvfp4 weights and 16 bits, got mxfp4 and nvfp4"),
        ({"activations": "fp8"}, "nvfp4 weights and 16 bits, got nvfp4 and fp8"),
        ({"weight": "mxfp4", "activations": "bf16"}, "and 16 bits, got mxfp4 and bf16"),
        ({"rounding": "eager"}, "rounding 'fused', got 'eager' (prepare with backend='triton')"),
        ({"experts": 1025}, "local experts <= 1024, got 1025"),
        ({"tokens": 2**28}, "tokens * top_k, and tiles of a GEMM, <= 2147483647"),
        ({"tokens": 2**27, "hidden": 8192}, "and tiles of a GEMM, <= 2147483647"),
        ({"hidden": 2**20, "intermediate": 4096}, "weights of an expert <= 2147483647 bytes"),
    ],
)
def test_it_says_why_not(changed, words):
    assert words in (CUTE.reason(replace(GOOD, **changed), RTX) or "")


def test_variants_are_for_those_who_name_them():
    static, dynamic, emulated = (
        next(b for b in plan.BACKENDS if b.name == f"cute_nvfp4_{name}")
        for name in ("static", "dynamic", "emulated")
    )
    pipeline = next(b for b in plan.BACKENDS if b.name == "cute_nvfp4_pipeline")
    for b, style in ((pipeline, "pipeline"), (static, "static"), (dynamic, "dynamic")):
        assert b.reason(GOOD, H200) is None
        config = b.config(GOOD, RTX)
        assert config.style == style and config.ctas == RTX.sm_count
        assert replace(config, style=CUTE.config(GOOD, RTX).style) == CUTE.config(GOOD, RTX)
    why = emulated.reason(GOOD, H200) or ""
    assert "sm_120 or sm_121, whose MMA it emulates, got sm_90" in why
    assert emulated.reason(GOOD, SPARK) is None
    assert emulated.config(GOOD, RTX).fc1.arch == 90 and CUTE.config(GOOD, RTX).fc1.arch == 120
    assert emulated.reason(replace(GOOD, layout="rows"), RTX) is not None
    listed = {r.name for r in explain("fused_moe", plan.BACKENDS, GOOD, RTX, "auto").reasons}
    assert listed == {b.name for b in plan.BACKENDS if not b.variant} and CUTE.name in listed
    named = explain("fused_moe", plan.BACKENDS, GOOD, RTX, static.name)
    assert named.backend == static.name and static.name in {r.name for r in named.reasons}
    # what a variant alone would run, it is not chosen for
    only = (static, plan.BACKENDS[-1])
    assert choose("fused_moe", only, GOOD, RTX, "auto") is plan.BACKENDS[-1]


def test_where_it_is_not_available():
    assert CUTE.reason(GOOD, V100) == "needs sm_80 or newer, got sm_70"
    assert "needs a CUDA device" in (CUTE.reason(GOOD, Device("cpu")) or "")
    assert "layout rows or" in (TRITON.reason(GOOD, RTX) or "")


@pytest.mark.parametrize(
    ("activations", "backend", "device", "where"),
    [
        ("nvfp4", "auto", RTX, SM120),
        ("nvfp4", "auto", SPARK, SM120),
        ("nvfp4", "auto", H200, "sm80_w4_bf16"),
        ("nvfp4", "cute_nvfp4", H200, SM120),
        ("nvfp4", "cute_nvfp4_static", H200, SM120),
        ("nvfp4", "cute_nvfp4_emulated", RTX, SM120),
        ("nvfp4", "triton", RTX, "sm80_w4_bf16"),
        ("nvfp4", "reference", RTX, "rows"),
        ("bf16", "auto", RTX, "sm80_w4_bf16"),
        ("bf16", "auto", H200, "sm90_rs_w4"),
        ("bf16", "cute_nvfp4", H200, SM120),
        ("fp16", "cute_nvfp4_dynamic", RTX, SM120),
        ("fp8", "cute_nvfp4", RTX, "rows"),
        ("nvfp4", "cute_nvfp4", V100, "rows"),
        ("nvfp4", "cute_nvfp4", Device("cpu"), "rows"),
    ],
)
def test_weights_sit_where_their_back_end_wants_them(activations, backend, device, where):
    assert weight_layout("nvfp4", activations, backend, device) == where


@pytest.mark.parametrize(
    ("weight", "backend", "device", "where"),
    [
        ("mxfp4", "auto", RTX, SM120),
        # nothing else runs it
        ("mxfp4", "auto", H200, SM120),
        ("mxfp4", "cute_nvfp4_static", H200, SM120),
        ("mxfp4", "triton", H200, "rows"),
        ("mxfp4", "auto", V100, "rows"),
        ("mxfp4", "auto", Device("cpu"), "rows"),
        ("nvfp4", "auto", RTX, "rows"),
    ],
)
def test_weights_for_mxfp4_activations(weight, backend, device, where):
    assert weight_layout(weight, "mxfp4", backend, device) == where


@pytest.mark.parametrize(
    ("format", "n", "k"),
    [("nvfp4", *s) for s in [(128, 64), (96, 80), (48, 16), (300, 272)]]
    + [("mxfp4", *s) for s in [(128, 128), (96, 96), (48, 32), (300, 288)]],
)
def test_packed_weights_come_back(format, n, k):
    q = draw.exact_quantized(format, (3, n, k), 1)
    if format == "nvfp4":
        q = cutemoe.QuantizedTensor(q.data, q.scale, torch.ones(3), format="nvfp4")
    packed = PackedWeight.of(q, layout=SM120)
    assert packed.layout == SM120 and packed.data.data_ptr() == q.data.data_ptr()
    back = packed.unpack()
    assert isinstance(back, cutemoe.QuantizedTensor)
    for name in ("data", "scale", "global_scale")[: 3 if format == "nvfp4" else 2]:
        assert_same(getattr(back, name).view(torch.uint8), getattr(q, name).view(torch.uint8))
    one = packed.group(1)
    assert one.layout == "rows" and one.shape == (1, n, k)
    assert_same(one.values(slice(0, n)), q[1].dequantize())


def test_codes_that_are_not_aligned_are_copied():
    q = draw.exact_quantized("nvfp4", (2, 16, 32), 1)
    odd = torch.empty(q.data.numel() + 1, dtype=torch.uint8)[1:].view(q.data.shape).copy_(q.data)
    packed = PackedWeight.of(cutemoe.QuantizedTensor(odd, q.scale, format="nvfp4"), layout=SM120)
    assert packed.data.data_ptr() % 16 == 0
    assert_same(packed.data, q.data)


def test_other_formats_stay_in_rows():
    q = draw.exact_quantized("int4", (2, 16, 128), 1)
    assert PackedWeight.of(q, layout=SM120).layout == "rows"


@BOTH
def test_the_reference_runs_a_layer_that_was_packed_for_it(format):
    layer = exact_layer(format, format)
    rows = layer.prepared()
    w13, w2 = (PackedWeight.of(w, layout=SM120) for w in (layer.w13, layer.w2))
    packed = replace(rows, w13=w13, w2=w2)
    r = draw.Routing(T=5, K=2, E=5, offset=0, pattern="skips", seed=1)
    ids, weights = r.ids(), r.weights(exact=True)
    x, kwargs = exact_x(5, layer, 2), {"activation": SATURATED, "backend": "reference"}
    space = cutemoe.Workspace.for_moe(packed, 5, 2)
    want = cutemoe.fused_moe(x, rows, ids, weights, **kwargs)
    assert_same(cutemoe.fused_moe(x, packed, ids, weights, workspace=space, **kwargs), want)
    why = cutemoe.explain("fused_moe", x, packed, ids, weights, backend="triton")
    assert why.backend is None


@pytest.mark.parametrize("tokens", [1, 16, 512, 513, 1024, 1025, 3072, 3073, 100_000])
@pytest.mark.parametrize("good", [GOOD, W4A16], ids=["codes", "numbers"])
def test_tiles_fit_the_workspace_and_sm120(good, tokens):
    problem = replace(good, tokens=tokens)
    config = cute_nvfp4_plan.configure(problem, RTX)
    m = config.fc1.tile.block_m
    assert config.fc2.tile is config.fc1.tile and m >= MIN_TILE_ROWS
    assert cute_nvfp4_plan.most_tiles(problem, m) <= max_tiles(tokens * 8, problem.experts)
    assert config.fc1.tile.smem_bytes <= cute_nvfp4_plan.SMEM_LIMIT
    mean = tokens * 8 / 256
    assert m == (16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 96 else 128)


def test_scratch_is_compact():
    """256 experts, 1024 routed rows, H = 7168, I = 2048: 5.4 MB, however the rows come about."""
    for tokens, top_k in ((128, 8), (1024, 1), (32, 32)):
        plan = layout(tokens, top_k, 256, 7168, 2048, "nvfp4", True, weights=SM120)
        assert plan.nbytes < 5.4e6
    # a prefill of 8192 tokens: what x and the FC1 output have in codes, and 2 MB of lists
    rows = 8192 * 8
    codes = rows * (4096 + 2048) * 9 // 16
    plan = layout(8192, 8, 256, 4096, 2048, "nvfp4", True, weights=SM120)
    assert plan.nbytes < codes + 2e6


@given(rows=st.integers(1, 100_000), hidden=draw.multiples(16, 600))
def test_parts_of_y_fit_and_cover_it(rows, hidden):
    slots, columns = y_parts(rows, hidden)
    assert slots * rows * columns * 4 <= y_bytes(rows, hidden)
    if columns < hidden:
        # two parts, so that one is computed while the other is added up
        assert slots == 2 and columns % cute_nvfp4_plan.BLOCK_N == 0
        assert rows * hidden * 4 > WHOLE_Y
    else:
        assert (slots, columns) == (1, hidden)


def packed_layer(kind="nvfp4", **kwargs):
    """A prepared layer on the CPU with its weights where the kernels want them."""
    layer = exact_layer(*LAYERS[kind], **kwargs)
    w13, w2 = (PackedWeight.of(w, layout=SM120) for w in (layer.w13, layer.w2))
    return layer, replace(layer.prepared(), w13=w13, w2=w2)


def launches(monkeypatch, style, moe, layer, x, ids, weights, activation=SATURATED):
    """(kernel, configuration, arguments) of every launch of a call."""
    from cutemoe.moe import cute_nvfp4_launch as launch

    seen = []
    for name in ("sort", "quantise", "fc1", "fc2", "fused"):

        def kernel(config, name=name):
            return lambda *args: seen.append((name, config, args))

        monkeypatch.setattr(launch, name, kernel)
    t, _ = api._tensors(x, moe, ids, weights, activation, None, None, "auto")
    problem = Problem.of(
        t, activations=layer.activations, gate_up=layer.gate_up, activation="swiglu",
        expert_offset=3, deterministic=True, rounding="fused",
    )  # fmt: skip
    config = replace(cute_nvfp4_plan.configure(problem, RTX), style=style)
    launch.run(problem, config, t)
    return problem, seen


def test_the_pipeline_is_four_launches_with_what_the_tensors_show(monkeypatch):
    layer, moe = packed_layer(H=80, I=48)
    ids, weights = torch.zeros(7, 4, dtype=torch.int64)[:, :2], torch.ones(7, 2)
    x = torch.zeros(7, 83).bfloat16()[:, :80]
    limit = cutemoe.SwiGLU(alpha=torch.ones(5), limit=3.0)
    problem, seen = launches(monkeypatch, "pipeline", moe, layer, x, ids, weights, limit)
    assert [name for name, *_ in seen] == ["sort", "quantise", "fc1", "fc2"]
    sort, quantise, fc1, whole = (config for _, config, _ in seen)
    fc2, combine = whole.gemm, whole.rows
    assert (sort.ids, sort.flat) == ("int64", False) and not quantise.flat
    assert not quantise.wide and combine.wide
    assert fc1.factor and fc1.bias and fc1.limit and fc1.alpha_e and not fc1.limit_e
    assert fc1.vector == fc2.vector == 8 and fc1.outputs == 64 and fc2.outputs == 128
    assert all(c.arch == 120 for c in (quantise, fc1, fc2, combine))
    # every tile that the routed rows can need, times the blocks of outputs
    tiles = cute_nvfp4_plan.most_tiles(problem, 16)
    assert seen[2][2][-1] == tiles * 1
    # and two CTAs of 128 threads for the sums of 7 * 80 / 4 outputs
    assert seen[3][2][-1] == tiles * 1 + 2 and seen[3][2][7] == (3, 5, 2)
    assert seen[0][2][3:] == (3, 5, 16) and seen[0][2][2] is seen[3][2][6]
    # FC2 reads what FC1 wrote
    wrote, read = seen[2][2][5], seen[3][2][0]
    assert [t.data_ptr() for t in wrote] == [t.data_ptr() for t in read[:2]]


def test_numbers_need_no_launch_that_quantises(monkeypatch):
    layer, moe = packed_layer("w4a16")
    ids, weights = torch.zeros(7, 2, dtype=torch.int32), torch.ones(7, 2)
    x = torch.zeros(7, 67).bfloat16()[:, :64]
    problem, seen = launches(monkeypatch, "pipeline", moe, layer, x, ids, weights)
    assert [name for name, *_ in seen] == ["sort", "fc1", "fc2"]
    fc1, fc2 = seen[1][1], seen[2][1].gemm
    assert fc1.numbers == fc2.numbers == "bf16" and not fc1.scaled
    assert not fc1.wide and fc2.wide and fc1.tile.numbers
    # x as it is, and how many slots share a row
    assert seen[1][2][0][0] is x and seen[1][2][0][1] == problem.top_k
    (wrote,), read = seen[1][2][5], seen[2][2][0][0]
    assert wrote.data_ptr() == read.data_ptr() and wrote.shape == (14, 96)
    _, seen = launches(monkeypatch, "static", moe, layer, x, ids, weights)
    ((name, config, args),) = seen
    assert name == "fused" and args[2] is None and len(args[4]) == 1 and not config.fc1.wide


@pytest.mark.parametrize("style", ["static", "dynamic"])
def test_a_fused_layer_is_one_launch_with_counters_at_zero(monkeypatch, style):
    layer, moe = packed_layer()
    ids, weights = torch.zeros(7, 2, dtype=torch.int32), torch.ones(7, 2)
    x = torch.zeros(7, 64).bfloat16()
    _, seen = launches(monkeypatch, style, moe, layer, x, ids, weights)
    ((name, config, args),) = seen
    assert name == "fused" and config.dynamic == (style == "dynamic")
    assert config.sort.flat and config.quantise.wide and config.fc2.rows.wide
    assert not args[6].any() and args[7] == (3, 5, 1, 16) and args[8] == 188


def test_codes_that_lost_their_alignment_are_refused(monkeypatch):
    layer, moe = packed_layer()
    odd = torch.empty(moe.w2.data.numel() + 8, dtype=torch.uint8)[8:].view(moe.w2.data.shape)
    moe = replace(moe, w2=replace(moe.w2, data=odd.copy_(moe.w2.data)))
    ids, weights = torch.zeros(7, 2, dtype=torch.int32), torch.ones(7, 2)
    with pytest.raises(cutemoe.Unsupported, match="w2: back end 'cute_nvfp4' takes codes aligned"):
        launches(monkeypatch, "static", moe, layer, torch.zeros(7, 64).bfloat16(), ids, weights)


GPU = Target("cute_nvfp4", "cuda")


def sized(kind, H, I, **kwargs):  # noqa: E741
    """A random layer of about these sizes."""
    block = 32 if kind == "mxfp4" else 16
    H, I = (-(-n // block) * block for n in (H, I))  # noqa: E741
    return random_layer(*LAYERS[kind], H=H, I=I, seed=5, **kwargs)


def run(layer, x, ids, weights, **kwargs):
    moe = layer.prepared(GPU)
    x, ids, weights = GPU.put((x, ids, weights))
    return moe, cutemoe.fused_moe(x, moe, ids, weights, backend="cute_nvfp4", **kwargs)


@pytest.mark.gpu
@EACH
@pytest.mark.parametrize("tokens", [1, 40, 400])
def test_a_token_has_the_same_bits_in_every_batch(kind, tokens):
    layer = sized(kind, 320, 144, E=4)
    r = draw.Routing(T=tokens, K=2, E=4, offset=0, pattern="uniform", seed=6)
    x = draw.normal((tokens, layer.hidden), 7, torch.bfloat16)
    ids, weights = r.ids(), r.weights()
    whole = run(layer, x, ids, weights)[1]
    for rows in (slice(0, 1), slice(tokens // 2, tokens)):
        assert_same(run(layer, x[rows], ids[rows], weights[rows])[1], whole[rows])


@pytest.mark.gpu
@EACH
@pytest.mark.parametrize("style", ["pipeline", "static", "dynamic"])
def test_a_graph_replays_with_new_tokens_and_routing(kind, style):
    layer = sized(kind, 256, 96, E=6)
    moe = layer.prepared(GPU)
    cases = []
    for seed in range(4):
        r = draw.Routing(T=24, K=3, E=6, offset=0, pattern=draw.PATTERNS[seed], seed=seed)
        x = draw.normal((24, layer.hidden), seed + 9, torch.bfloat16)
        cases.append(GPU.put((x, r.ids(), r.weights())))
    want = [
        cutemoe.fused_moe(x, moe, ids, weights, backend="cute_nvfp4") for x, ids, weights in cases
    ]
    with Poison("cuda") as poison:
        inputs = [torch.empty_like(t).copy_(t) for t in cases[0]]
        space = poison.empty((cutemoe.Workspace.for_moe(moe, 24, 3).nbytes,), torch.uint8)
        out = poison.empty((24, 256), torch.bfloat16)
        # compiled before it is captured
        x, ids, weights = inputs
        cutemoe.fused_moe(x, moe, ids, weights, backend=f"cute_nvfp4_{style}")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cutemoe.fused_moe(
                x, moe, ids, weights, out=out, workspace=cutemoe.Workspace(space),
                backend=f"cute_nvfp4_{style}",
            )  # fmt: skip
        for _ in range(3):
            for case, y in zip(cases, want, strict=True):
                for to, t in zip(inputs, case, strict=True):
                    to.copy_(t)
                out.fill_(torch.nan)
                graph.replay()
                assert_same(out, y)


def direct(layer, args, style, ctas, *, space=None, out=None, activation=SATURATED):
    """A call with a launch style and a number of CTAs of the test's choice."""
    from cutemoe.moe.cute_nvfp4_launch import run

    moe = layer.prepared(GPU)
    x, ids, weights = args
    t, _ = api._tensors(x, moe, ids, weights, activation, out, space, "cute_nvfp4")
    problem = Problem.of(
        t, activations=layer.activations, gate_up=layer.gate_up, activation="swiglu",
        expert_offset=0, deterministic=True, rounding="fused",
    )  # fmt: skip
    config = cute_nvfp4_plan.configure(problem, Device.of(x.device))
    run(problem, replace(config, style=style, ctas=ctas or config.ctas), t)
    return t.out


STYLED = [("static", 0), ("static", 3), ("dynamic", 0), ("dynamic", 5)]


def assert_repeats(layer, args, style, ctas, want):
    """Three calls in one workspace, poisoned before the first, give the bits of `want`."""
    tokens, top_k = args[1].shape
    with Poison("cuda") as poison:
        size = cutemoe.Workspace.for_moe(layer.prepared(GPU), tokens, top_k).nbytes
        space = cutemoe.Workspace(poison.empty((size,), torch.uint8))
        out = poison.empty(want.shape, want.dtype)
        for _ in range(3):
            assert_same(direct(layer, args, style, ctas, space=space, out=out), want)


@pytest.mark.gpu
@EACH
@pytest.mark.parametrize(("style", "ctas"), STYLED)
@pytest.mark.parametrize("pattern", draw.PATTERNS)
@pytest.mark.parametrize("tokens", [1, 9, 150])
def test_one_launch_gives_the_bits_of_the_pipeline(kind, style, ctas, pattern, tokens):
    layer = sized(kind, 544, 208, E=6, gate_up="interleaved")
    r = draw.Routing(T=tokens, K=3, E=6, offset=0, pattern=pattern, seed=tokens)
    args = GPU.put((draw.normal((tokens, layer.hidden), 7, torch.bfloat16), r.ids(), r.weights()))
    want = direct(layer, args, "pipeline", 0)
    assert_repeats(layer, args, style, ctas, want)


@pytest.mark.gpu
@EACH
@pytest.mark.parametrize("style", ["pipeline", "static", "dynamic"])
@pytest.mark.parametrize("pattern", ["uniform", "one expert", "skips"])
@pytest.mark.parametrize(("tokens", "ctas"), [(3, 2), (150, 0), (150, 3), (700, 0)])
def test_y_in_parts_gives_the_bits_of_a_whole_y(monkeypatch, kind, style, pattern, tokens, ctas):
    from cutemoe.moe import cute_nvfp4_launch, workspace

    layer = sized(kind, 1200, 208, E=6)
    r = draw.Routing(T=tokens, K=3, E=6, offset=0, pattern=pattern, seed=tokens)
    args = GPU.put((draw.normal((tokens, layer.hidden), 7, torch.bfloat16), r.ids(), r.weights()))
    monkeypatch.setattr(workspace, "WHOLE_Y", 1 << 30)
    cute_nvfp4_launch._layout.cache_clear()
    want = direct(layer, args, "pipeline", 0)
    monkeypatch.setattr(workspace, "WHOLE_Y", 0)
    cute_nvfp4_launch._layout.cache_clear()
    # ten parts, the last of 48 or 64 columns
    assert workspace.y_parts(tokens * 3, layer.hidden) == (2, 128)
    assert_repeats(layer, args, style, ctas, want)
    cute_nvfp4_launch._layout.cache_clear()


@pytest.mark.gpu
@EACH
@pytest.mark.parametrize("style", ["pipeline", "static", "dynamic"])
def test_a_stream_that_holds_multiprocessors_delays_but_does_not_hang(kind, style):
    layer = sized(kind, 256, 96, E=6)
    r = draw.Routing(T=40, K=2, E=6, offset=0, pattern="skewed", seed=1)
    args = GPU.put((draw.normal((40, layer.hidden), 7, torch.bfloat16), r.ids(), r.weights()))
    want = direct(layer, args, "pipeline", 0)
    busy = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    for _ in range(8):
        with torch.cuda.stream(busy):
            torch.cuda._sleep(3_000_000)
            for _ in range(8):
                noise = (noise @ noise).clamp(-1, 1)
        assert_same(direct(layer, args, style, 0), want)
    torch.cuda.synchronize()


@pytest.mark.gpu
@BOTH
def test_extreme_values_of_x_and_weights(format):
    """Zero rows, subnormal and saturated block scales, the greatest numbers, NaN and infinities."""
    layer = sized(format, 64, 48, E=2, biases=False)
    x = draw.normal((12, 64), 1, torch.bfloat16)
    x[0], x[1, :16], x[2], x[3] = 0.0, 0.0, x[2] * 2.0**-20, x[3] * 2.0**100
    x[4, 20], x[5, 0], x[6, 63], x[7] = torch.nan, torch.inf, -torch.inf, -0.0
    ids, weights = torch.arange(12)[:, None].int() % 2, torch.ones(12, 1)
    want = cutemoe.fused_moe(x, layer.prepared(), ids, weights, backend="reference")
    got = run(layer, x, ids, weights)[1].cpu()
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    assert_same(got[[0, 7]], want[[0, 7]])
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite)
    assert (got - want)[finite].abs().max() <= want[finite].abs().max() * 2**-7


def with_small_scales(q: cutemoe.QuantizedTensor) -> cutemoe.QuantizedTensor:
    """The same values with block scales 2^-8 times as great: subnormal in e4m3."""
    scale = (q.scale.float() * 2.0**-8).to(torch.float8_e4m3fn)
    assert scale.view(torch.uint8).max() < 8 and q.global_scale is not None
    return cutemoe.QuantizedTensor(q.data, scale, q.global_scale * 2.0**8, format="nvfp4")


@pytest.mark.parametrize("where", ["reference", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_subnormal_scales_of_weights_are_worth_what_they_say(where):
    layer = exact_layer("nvfp4", "nvfp4")
    small = replace(layer, w13=with_small_scales(layer.w13), w2=with_small_scales(layer.w2))
    r = draw.Routing(T=40, K=2, E=5, offset=0, pattern="skips", seed=1)
    args = exact_x(40, layer, 2), r.ids(), r.weights(exact=True)
    want = meant(layer, args)
    assert bool(want.any())
    got = meant(small, args) if where == "reference" else run(small, *args, activation=SATURATED)[1]
    assert_same(got.cpu(), want)


def meant(layer, args):
    x, ids, weights = args
    moe = layer.prepared()
    return cutemoe.fused_moe(x, moe, ids, weights, activation=SATURATED, backend="reference")


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_scale_that_is_nan_is_refused_with_the_weights(byte):
    layer = exact_layer("nvfp4", "nvfp4")
    layer.w13.scale.view(torch.uint8)[1, 2, 3] = byte
    with pytest.raises(cutemoe.InvalidCall, match="w13: expected scales that are finite"):
        layer.prepared()
