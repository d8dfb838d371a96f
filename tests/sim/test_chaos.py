"""The protocol core under chaos, a thousand seeds; and with each of its guards taken out, which some seed notices."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.deep, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
GOSSIP = HERE.parents[1] / "p2pkv" / "gossip"
SOURCES = [
    path
    for path in (*sorted(GOSSIP.glob("core/*.cpp")), *sorted(GOSSIP.glob("simulator/*.cpp")), HERE / "chaos_main.cpp")
    if not path.name.startswith("bind")
]
SEEDS = 1_000
SEEDS_OF_MUTANTS = 3_000

MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    "the set's checksum is ignored": [
        (
            "replica.cpp",
            "if (entries_.checksum(slot_) == checksum) {",
            "if (true) {",
        ),
    ],
    "epochs and instances are ignored": [
        (
            "slot_table.hpp",
            "return found.life == life ? found.slot : 0;",
            "return found.slot;",
        ),
    ],
    "what others say of a death is believed": [
        (
            "repair.cpp",
            "if (entry.seq > std::max(replica.seq(), replica.said())) heard_of(now, slot, entry.seq);",
            'if (entry.age_ms > 3000 && !members_[slot]->hidden) hide(now, slot, "so they say");',
        ),
    ],
    "a counter is given out twice": [
        (
            "counters.hpp",
            "std::uint64_t take() { return next_++; }",
            "std::uint64_t take() { return next_ % 100 == 99 ? next_++ - 1 : next_++; }",
        ),
    ],
    "STALE is dropped": [
        (
            "members.cpp",
            "if (stale.to != life_.instance || stale.epoch < life_.epoch || stale.instance == life_.instance) return;",
            "return;",
        ),
    ],
    "a replayed frame is as good as a new one": [
        (
            "counters.hpp",
            "return next_ - counter <= kFrames && (word(counter) & bit(counter)) == 0;",
            "return true;",
        ),
    ],
    "what others repeat is shown without the owner's word": [
        (
            "replica.cpp",
            "if (item.direct || seq == said_seq_) until = seq;",
            "until = seq;",
        ),
        (
            "repair.cpp",
            "} else if (!member.hidden && !member.replica.proven()) {",
            "} else if (false) {",
        ),
    ],
    "a life is a member without having repeated our instance": [
        (
            "members.cpp",
            "if (hello.echo == life_.instance && !leaving_) {",
            "if (!leaving_) {",
        ),
    ],
    "a snapshot is not held against its checksum": [
        (
            "replica.cpp",
            "if (whole->sum != whole->checksum || (whole->seq == said_seq_ && whole->checksum != said_checksum_)) {",
            "if (false) {",
        ),
    ],
    "a node that stood still judges the others at once": [
        (
            "gossip.cpp",
            "judge_from_ = now + kGraceS;\n",
            "\n",
        ),
    ],
}
"""File, what stands there, and what stands there instead. Where two guards stand behind each other, both go."""


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("NO C++ COMPILER: the protocol core's mutants are not tested")
    return found


def compile_one(compiler: str, source: Path, to: Path, include: Path = GOSSIP, *flags: str) -> None:
    include_flags = [f"-I{include / 'simulator'}", f"-I{include / 'core'}"]
    command = [compiler, "-std=c++20", "-O1", *flags, *include_flags, "-c", str(source), "-o", str(to)]
    subprocess.run(command, check=True, timeout=200)


def chaos(program: Path, first: int, count: int) -> str:
    """What it says was broken; empty when nothing was."""
    ended = subprocess.run(
        [str(program), str(first), str(count)], capture_output=True, text=True, timeout=250, check=False
    )
    return "" if ended.returncode == 0 else ended.stderr[-4000:] or f"it ended with {ended.returncode}"


def test_no_rule_is_broken_and_none_of_the_language(compiler: str, tmp_path: Path) -> None:
    program = tmp_path / "chaos"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = [f"-I{GOSSIP / 'simulator'}", f"-I{GOSSIP / 'core'}"]
    subprocess.run([compiler, *flags, *include, *map(str, SOURCES), "-o", str(program)], check=True, timeout=280)
    assert chaos(program, 1, SEEDS) == ""


@pytest.mark.parametrize("what", MUTANTS)
def test_a_core_without_one_of_its_guards_breaks_a_rule(compiler: str, what: str, tmp_path: Path) -> None:
    shutil.copytree(GOSSIP.parent / "index" / "core", tmp_path / "index" / "core")
    tree = tmp_path / "gossip"
    shutil.copytree(GOSSIP, tree, ignore=shutil.ignore_patterns("*.py", "*.so", "__pycache__"))
    for name, guard, instead in MUTANTS[what]:
        path = tree / "core" / name
        text = path.read_text()
        assert text.count(guard) == 1
        path.write_text(text.replace(guard, instead))
    program = tmp_path / "chaos"
    sources = [tree / source.relative_to(GOSSIP) if source.is_relative_to(GOSSIP) else source for source in SOURCES]
    flags = ["-std=c++20", "-O1", f"-I{tree / 'simulator'}", f"-I{tree / 'core'}"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True, timeout=280)
    assert chaos(program, 1, SEEDS_OF_MUTANTS), f"nobody notices that {what}"
