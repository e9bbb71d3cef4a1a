"""Tables of measured configurations, and the search for them."""

from dataclasses import replace

import pytest
import torch

from cutemoe.errors import InvalidCall
from cutemoe.runtime import settings, tune
from cutemoe.runtime.device import Device

CARD = Device("cuda", 0, "a card", 90, 132, 232448, True)
SHAPE = {"hidden": 64, "weight": "mxfp4"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Shipped and user tables in folders of the test."""
    monkeypatch.setattr(tune, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(settings, "cache_dir", lambda: tmp_path / "cache")
    tune.forget()
    yield tmp_path
    monkeypatch.undo()
    tune.forget()


def rows(*sizes: int, shape=None, tag="a") -> list[tune.Row]:
    return [tune.Row("op", shape or SHAPE, n, {"tile": [n], "tag": tag}, 1.5 * n) for n in sizes]


def found(size: int, **changed):
    config = tune.find("op", CARD, {**SHAPE, **changed}, size)
    return None if config is None else (config["tile"][0], config["tag"])


def test_a_call_takes_the_next_size_up():
    tune.write(tune.file_of(tune.SHIPPED, CARD), rows(64, 1, 4))
    assert [found(n) for n in (1, 2, 4, 17, 64)] == [
        (1, "a"), (4, "a"), (4, "a"), (64, "a"), (64, "a")
    ]  # fmt: skip
    # past the largest, far below the next, another shape
    assert found(65) is None and found(16) is None and found(1, hidden=128) is None
    assert tune.find("other", CARD, SHAPE, 1) is None


def test_a_table_is_of_one_architecture_and_size_of_card():
    tune.write(tune.file_of(tune.SHIPPED, CARD), rows(4))
    for other in (replace(CARD, arch=80), replace(CARD, sm_count=114)):
        assert tune.find("op", other, SHAPE, 4) is None
    # compiled ahead, a card has no name
    assert tune.find("op", replace(CARD, name="sm_90a"), SHAPE, 4) is not None


def test_rows_of_the_user_stand_in_place_of_shipped_ones(folders):
    tune.write(tune.file_of(tune.SHIPPED, CARD), rows(4, 16))
    assert found(3) == (4, "a")
    tune.write(tune.file_of(folders / "cache" / "tuned", CARD), rows(4, tag="mine"))
    assert found(3) == (4, "mine") and found(5) == (16, "a")


def test_writing_replaces_rows_of_the_same_problem_only():
    path = tune.file_of(tune.SHIPPED, CARD)
    tune.write(path, rows(4, 16))
    tune.write(path, rows(4, tag="b") + rows(4, shape={"hidden": 1}))
    assert found(4) == (4, "b") and found(16) == (16, "a")
    assert len(tune._read(path)) == 3


def test_a_broken_table_is_named(folders):
    path = tune.file_of(tune.SHIPPED, CARD)
    path.parent.mkdir()
    path.write_text("[{}]")
    with pytest.raises(InvalidCall, match="a table that `cutemoe tune` wrote"):
        found(1)


def test_a_configuration_is_remembered_until_another_is_tried():
    calls = []

    @tune.kept
    def configure(problem, device):
        calls.append(problem)
        return tune.find("op", device, SHAPE, problem)

    tune.write(tune.file_of(tune.SHIPPED, CARD), rows(4))
    assert configure(4, CARD) == configure(4, CARD) and calls == [4]
    with tune.trying({"tile": [9]}):
        assert configure(4, CARD) == {"tile": [9]}
        with tune.trying(None):
            assert configure(4, CARD) is None
    assert (configure(4, CARD) or {})["tile"] == [4]


TIMES = {0: 10.0, 1: 8.0, 2: 7.0, 3: 1.0, 12: 5.0}


def measure(config: int) -> float:
    if config == 3:
        raise RuntimeError("wrong result")
    return TIMES[config]


def test_the_fastest_right_candidate_wins():
    said = []
    passes = (lambda c: [1, 3, 2], lambda c: [c + 10])
    best, seen = tune.search(0, passes, measure, seconds=60, say=said.append)
    assert best == 12 and seen[12] == 5.0 and 3 not in seen
    assert any("wrong result" in line for line in said)


def test_noise_does_not_move_the_choice():
    times = {0: 10.0, 1: 9.95}
    assert tune.search(0, (lambda c: [1],), times.__getitem__, seconds=60)[0] == 0


def test_no_candidate_is_begun_after_the_time():
    best, seen = tune.search(0, (lambda c: [1, 2],), measure, seconds=-1.0)
    assert best == 0 and list(seen) == [0]


def test_a_wrong_start_is_an_error():
    with pytest.raises(RuntimeError, match="wrong result"):
        tune.search(3, (), measure, seconds=60)


def test_nothing_is_tuned_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InvalidCall, match="capture"):
        tune.search(0, (), measure, seconds=60)
