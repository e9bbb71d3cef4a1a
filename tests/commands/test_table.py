from hypothesis import given
from hypothesis import strategies as st

from cutemoe.commands.table import table

cells = st.text(alphabet="ab ./%", max_size=8)


def test_columns_are_aligned() -> None:
    text = table(["name", "us"], [["a", "1.5"], ["longer", "123.0"]], right="us")
    assert text.split("\n") == [
        "name       us",
        "------  -----",
        "a         1.5",
        "longer  123.0",
    ]


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n))))
def test_every_row_is_one_line_no_wider_than_the_rule(rows: list[list[str]]) -> None:
    n = len(rows[0]) if rows else 2
    lines = table([f"t{i}" for i in range(n)], rows, right="t0").split("\n")
    assert len(lines) == len(rows) + 2
    assert max(map(len, lines)) == len(lines[1])
    assert not any(line.endswith(" ") for line in lines)
