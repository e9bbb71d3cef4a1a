"""The command line itself."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cutemoe import __main__, __version__


@pytest.mark.parametrize("words", [[], ["bench"], ["demo", "--fast"]])
def test_bad_arguments_list_the_commands_that_exist(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        __main__.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "demo" in error and ("doctor" in error or words == ["demo", "--fast"])


def test_help_lists_nothing_that_does_not_exist(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        __main__.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in __main__.COMMANDS)
    assert not any(name in out for name in ("bench",))


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["--version"])
    assert capsys.readouterr().out == f"cutemoe {__version__}\n"


@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_is_that_of_the_command(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from cutemoe.commands import doctor

    asked: list[bool] = []
    monkeypatch.setattr(doctor, "run", lambda as_json: asked.append(as_json) or code)
    assert __main__.main(["doctor", "--json"]) == code and asked == [True]


def test_the_parser_loads_without_torch() -> None:
    program = (
        "import sys\nsys.modules['torch'] = None\nimport cutemoe.__main__ as m\nm.parser()\n"
        "import cutemoe.commands"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
