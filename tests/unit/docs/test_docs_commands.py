"""What the documentation tells a reader to type works: commands are run, names of commands and targets exist."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pkv.cli import COMMANDS
from tests.unit.docs.fences import blocks

ROOT = Path(__file__).resolve().parents[3]
SCRIPT_TIMEOUT_S = 90
AGENT_TIMEOUT_S = 30
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CLIENT_PAGE = ROOT / "docs" / "client.md"
SHELL = ("console", "bash", "sh")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _story_pages() -> list[object]:
    """Pages with tested shell blocks, marked ``cluster`` where they start agents."""
    found: list[object] = []
    for page in PAGES:
        tested = [block for block in blocks(page) if block.tested]
        if any(block.language in SHELL for block in tested):
            marks = [pytest.mark.cluster] if any("cluster" in block.options for block in tested) else []
            found.append(pytest.param(page, id=_name(page), marks=marks))
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name (a Unix socket's path has 107 bytes), removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="p2pkv-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def _environment(place: Path) -> dict[str, str]:
    """A reader's shell: this interpreter's commands first on the path, nothing of p2pkv set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("P2PKV_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"PATH": path, "HOME": str(place), "XDG_RUNTIME_DIR": str(place), "XDG_STATE_HOME": str(place)}


def _free_ports(count: int) -> list[int]:
    with_ports = [socket.socket() for _ in range(count)]
    try:
        for each in with_ports:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in with_ports]
    finally:
        for each in with_ports:
            each.close()


def _movable(text: str, place: Path, ports: dict[str, int]) -> str:
    """The text with this test's own ports for the default ones and its own directory for /tmp."""
    text = re.sub(r"\b78[45]\d\b", lambda port: str(ports.setdefault(port[0], 0) or port[0]), text)
    return text.replace("/tmp/", f"{place}/")


@pytest.mark.parametrize("page", _story_pages())
def test_the_commands_of_a_page_work_in_order(page: Path, place: Path) -> None:
    """All tested blocks of a page are one shell session, as they are for a reader."""
    tested = [block for block in blocks(page) if block.tested]
    named = sorted({port for block in tested for port in re.findall(r"\b78[45]\d\b", block.text)})
    ports = dict(zip(named, _free_ports(len(named)), strict=True))
    script = "set -euo pipefail\n"
    for block in tested:
        text = _movable(block.commands() if block.language in SHELL else block.text, place, ports)
        if "file" in block.options:
            (place / block.options["file"]).write_text(text)
        elif block.language in SHELL:
            script += f"# {_name(page)}:{block.line}\n{text}"
    ended = _run(script, place)
    assert ended.returncode == 0, f"{script}\n--- printed:\n{ended.stdout}"


def _run(script: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a process group of its own, which is gone afterwards whatever it left behind."""
    shown = place / "shown"
    with shown.open("w+") as output:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=place,
            env=_environment(place),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = shell.wait(SCRIPT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = -signal.SIGALRM
        finally:
            try:
                os.killpg(shell.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            shell.wait()
    return subprocess.CompletedProcess(script, code, shown.read_text())


@pytest.fixture
def agent(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An agent that runs, and whose socket P2PKV_SOCKET names: what docs/client.md takes for granted."""
    path = str(place / "agent.sock")
    ports = ["--peer-port", "0", "--http-port", "0"]
    command = [sys.executable, "-m", "p2pkv.cli", "agent", "--socket", path, "--capacity", "256MiB", *ports]
    log = place / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--transport", "tcp", "--set", "state_dir=:memory:"],
            env=_environment(place),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while not _accepts(path):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        monkeypatch.setenv("P2PKV_SOCKET", path)
        yield path
    finally:
        process.terminate()
        try:
            process.wait(AGENT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _accepts(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


@pytest.mark.cluster
def test_the_examples_of_the_client_page_run_from_top_to_bottom(agent: str) -> None:
    """All Python blocks of docs/client.md share one namespace, as they would in a reader's session."""
    examples = [block for block in blocks(CLIENT_PAGE) if block.language == "python"]
    run = [block for block in examples if not block.marker.startswith("no test")]
    assert run, "docs/client.md has no example that is run"
    names: dict[str, object] = {"__name__": "docs_client"}
    for block in run:
        program = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's line
        exec(compile(program, str(CLIENT_PAGE), "exec"), names)


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for match in re.finditer(r"(?:`|^\$ |^)make ([a-z][a-z0-9-]*)", page.read_text(), re.MULTILINE):
            assert match[1] in targets, f"{_name(page)}: make {match[1]}"


def test_every_subcommand_that_is_named_exists() -> None:
    for page in PAGES:
        for match in re.finditer(r"(?:`|^\$ |bin/)p2pkv ([a-z]+)\b", page.read_text(), re.MULTILINE):
            assert match[1] in COMMANDS, f"{_name(page)}: p2pkv {match[1]}"


def test_every_file_that_a_top_page_links_to_exists() -> None:
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target and not target.startswith("mailto:"):
                assert (ROOT / target).exists(), f"{_name(page)} links to {target}"


def test_a_console_block_is_its_commands_without_their_output(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n<!-- test: cluster, file=a.py -->\n```console\n$ one \\\n>   two\nprinted\n$ three\n```\n\n"
        "```python\nx\n```\n"
    )
    first, second = blocks(page)
    assert first.commands() == "one \\\n  two\nthree\n"
    assert first.tested and first.options == {"cluster": "", "file": "a.py"}
    assert first.line == 5
    assert not second.tested
