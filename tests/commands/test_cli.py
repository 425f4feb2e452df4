"""The command line: routing, exit codes, and what it says when something is missing."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys

import pytest

from mmfast import __version__, cli


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_describes_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: mmfast {name}" in capsys.readouterr().out


def test_help_lists_all_commands_without_loading_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"mmfast {__version__}"


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "extra"), [("rich", "cli"), ("pytest_benchmark", "bench")])
def test_a_missing_package_names_the_extra(
    missing: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib.import_module("mmfast.commands.info"), "run", lacks)
    assert cli.main(["info"]) == 2
    assert f"{missing} is not installed: pip install 'mmfast[{extra}]'" in capsys.readouterr().err


def test_a_missing_module_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'mmfast.nothing'", name="mmfast.nothing")

    monkeypatch.setattr(importlib.import_module("mmfast.commands.info"), "run", lacks)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["info"])


@pytest.mark.parametrize("command", ["verify", "audit", "bench"])
def test_an_unknown_name_is_refused_with_the_known_ones(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "no_such_op"]) == 2
    message = capsys.readouterr().err
    assert "'no_such_op'" in message
    assert "add_layer_norm, " in message or "layer_norm" in message


def test_importing_the_command_line_loads_no_torch() -> None:
    code = "import sys, mmfast.cli; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
