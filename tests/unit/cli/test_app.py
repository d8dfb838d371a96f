"""The command line: lazy, fast, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest
import typer

import p2pkv
from p2pkv import cli
from p2pkv.errors import ConfigError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "p2pkv.cli", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A subcommand ``toy`` whose module is made up here."""
    module = ModuleType("p2pkv.cli.toy")
    monkeypatch.setitem(sys.modules, "p2pkv.cli.toy", module)
    monkeypatch.setitem(cli.COMMANDS, "toy", "A command of this test.")
    return module


def test_help_lists_every_command_without_importing_any() -> None:
    program = (
        "import sys\n"
        "from p2pkv import cli\n"
        "try:\n"
        "    cli.main(['--help'])\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "loaded = [name for name in cli.COMMANDS if f'p2pkv.cli.{name}' in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0, shown.stderr
    for name, text in cli.COMMANDS.items():
        assert f"  {name} " in shown.stdout
        assert text in shown.stdout


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from p2pkv import cli\n"
        "try:\n"
        "    cli.main(['--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'fastapi', 'uvicorn', 'uvloop', 'zeroconf', 'prometheus_client', 'rich', 'numpy', 'p2pkv._native'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0, shown.stderr


def test_every_listed_command_can_be_loaded_and_documents_itself() -> None:
    for name in cli.COMMANDS:
        shown = run(name, "--help")
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(f"Usage: p2pkv {name} ")


def test_version_is_printed() -> None:
    assert run("--version").stdout == f"p2pkv {p2pkv.__version__}\n"


def test_an_unknown_command_names_the_nearest_one() -> None:
    shown = run("doctr")
    assert shown.returncode == 2
    assert "doctor" in shown.stderr


def test_an_error_is_two_lines_on_stderr_and_exit_code_2(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ConfigError("it is wrong", hint="Make it right.", key="a.b")

    toy.toy = fail
    with pytest.raises(SystemExit) as end:
        cli.main(["toy"])
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: it is wrong (key=a.b)\nhint: Make it right.\n"


def test_with_json_an_error_is_one_object(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(as_json: bool = typer.Option(False, "--json")) -> None:
        raise ConfigError("it is wrong", hint="Make it right.", key="a.b")

    toy.toy = fail
    with pytest.raises(SystemExit) as end:
        cli.main(["toy", "--json"])
    assert end.value.code == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert error == {
        "type": "ConfigError",
        "message": "it is wrong",
        "hint": "Make it right.",
        "context": {"key": "a.b"},
    }


def test_a_module_may_hold_a_group_of_commands(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    toy.app = typer.Typer()

    @toy.app.command()
    def one() -> None:
        print("first")

    @toy.app.command()
    def two() -> None:
        print("second")

    with pytest.raises(SystemExit) as end:
        cli.main(["toy", "two"])
    assert not end.value.code
    assert capsys.readouterr().out == "second\n"


def test_a_command_chooses_its_exit_code(toy: ModuleType) -> None:
    def leave() -> None:
        raise typer.Exit(7)

    toy.toy = leave
    with pytest.raises(SystemExit) as end:
        cli.main(["toy"])
    assert end.value.code == 7


def test_an_unforeseen_error_is_not_swallowed(toy: ModuleType) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    toy.toy = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["toy"])
