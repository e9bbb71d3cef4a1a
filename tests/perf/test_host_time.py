"""What perf/host_time.py prints, from a CPU."""

from __future__ import annotations

import json

import host_time
import torch


def test_a_line_for_every_op(monkeypatch, capsys):
    monkeypatch.setattr(host_time, "CALLS", 1)
    argv = ["--device", "cpu", "--rounds", "1", "--backends", "reference", "--commit", "abc"]
    assert host_time.main(argv) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["call"] for line in lines] == [
        "torch add_", "gdn_decode", "gdn_verify", "fused_moe", "grouped_gemm"
    ]  # fmt: skip
    for line in lines:
        assert line["us"] > 0 and line["commit"] == "abc"
    assert all(line["us_checked"] > 0 for line in lines[1:])


def test_off_copies_to_an_address_that_is_no_multiple_of_16():
    x = torch.arange(6, dtype=torch.int32).view(2, 3)
    moved = host_time.off(x)
    assert torch.equal(moved, x) and moved.data_ptr() % 16 == 8
