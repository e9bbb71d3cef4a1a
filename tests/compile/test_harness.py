"""The compile harness sees what it claims to see."""

import pytest

from tests.compile.harness import SMEM_LIMIT, Ref, compile_kernel

SIGNATURE = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32", "stride": "i64"}
CONSTEXPRS = {"change": Ref("tests.compile.sample_kernel:halve"), "BLOCK": 32}


def dot(arch, **kwargs):
    constexprs = CONSTEXPRS | kwargs.pop("constexprs", {})
    return compile_kernel(
        "tests.compile.sample_kernel", "dot", SIGNATURE, constexprs, arch, **kwargs
    )


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_a_dot_compiles_for_every_architecture(arch):
    c = dot(arch, divisible=("stride", "K"))
    assert c.has_mma and c.local_bytes == 0 and c.spills == 0
    assert 0 < c.shared <= SMEM_LIMIT[arch] and 16 < c.registers <= 255
    assert c.has_wgmma == (arch == 90)
    assert f".target sm_{arch}" in c.ptx
    assert c.count(r"LDGSTS\.\S+|LDG\.\S+") > 0


def test_spills_are_seen():
    c = dot(80, constexprs={"SIDE": 256, "BLOCK": 16}, num_warps=4)
    assert c.local_bytes > 0 and c.spills > 0


def test_alignment_widens_loads():
    wide, narrow = dot(80, divisible=("stride", "K")), dot(80, unaligned=("a_ptr", "b_ptr"))
    load = r"(LDG|LDGSTS)\.\S*128\S*"
    assert wide.count(load) > 0 and narrow.count(load) == 0 and narrow.count(r"LDG\.\S+") > 0


def test_errors_name_the_kernel_and_the_reason():
    with pytest.raises(RuntimeError, match=r"(?s)dot for sm_90.*no such parameters: \['nope'\]"):
        dot(90, constexprs={"nope": 1})
    with pytest.raises(RuntimeError, match="no type and no value for parameter 'BLOCK'"):
        compile_kernel(
            "tests.compile.sample_kernel", "dot", SIGNATURE, {"change": CONSTEXPRS["change"]}, 90
        )
