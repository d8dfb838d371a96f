"""The prefix index's C++ core, built from its sources beside maps: under sanitizers, and with its guards taken out."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

HERE = Path(__file__).parent
CORE = Path(__file__).parents[2] / "p2pkv" / "index" / "core"
DRIVER = HERE / "index_side_by_side.cpp"
TABLE = [HERE / "key_table_alone.cpp", CORE / "key_table.cpp", CORE / "pages.cpp"]
SOURCES = [path for path in sorted(CORE.glob("*.cpp")) if path.name not in ("module.cpp", "token_chain.cpp")]
SANITIZERS = {"address,undefined": "alone", "thread": "threads"}
STEPS = 2_000

MUTANTS = {
    "holes are not looked at": (
        "prefix_index.cpp",
        "static_cast<std::uint32_t>(std::countr_one(held >> run.place))",
        "(held & run.mask()) != 0 ? run.count : 0",
    ),
    "what lies behind a hole begins anywhere": (
        "prefix_index.cpp",
        "row.resume = std::min(row.resume, run.from + skipped + static_cast<std::uint32_t>(std::countr_zero(behind)));",
        "row.resume = run.from + skipped;",
    ),
    "keys that are gathered keep their old position": (
        "writes.cpp",
        "table_.move(page.keys[place], make_position(id, place), make_position(gathering_, there));",
        "",
    ),
    "the bound on entries is not kept within a page": (
        "writes.cpp",
        "gained &= before;",
        "",
    ),
    "a dump takes a page's places for its keys": (
        "dump.cpp",
        "masks[h] = squeeze(masks[h], copy.held);",
        ";",
    ),
    "a group gets a line, and its keys stay where they are": (
        "key_table.cpp",
        "  if (one_more) move_up(to, lines);",
        "",
    ),
    "a group loses a line, and what is in it": (
        "key_table.cpp",
        "  regroup({widened_, width_ + 1}, width_);",
        "",
    ),
    "a line forgets what is in the rest": (
        "key_table.cpp",
        "if (left == 0) to.set_next(0);",
        "to.set_next(0);",
    ),
    "further lines are not dealt out": (
        "key_table.cpp",
        "      deal(to, lines, rest);",
        "",
    ),
    "an empty further line is kept": (
        "key_table.cpp",
        "      give(before->next());\n",
        "",
    ),
}


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("NO C++ COMPILER: the index's core is not tested by itself")
    return found


def run(program: Path, seed: int, steps: int = STEPS, readers: str = "alone") -> str:
    """What it says differs; empty when nothing does."""
    command = [str(program), str(seed), str(steps), readers]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=140, check=False)
    return "" if ended.returncode == 0 else ended.stderr[-4000:] or f"it ended with {ended.returncode}"


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_core_differs_from_maps_in_nothing_and_breaks_no_rule_of_the_language(
    compiler: str, sanitizer: str, tmp_path: Path
) -> None:
    program = tmp_path / "side_by_side"
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{CORE}", "-pthread"]
    subprocess.run([compiler, *flags, str(DRIVER), *map(str, SOURCES), "-o", str(program)], check=True, timeout=200)
    for seed in range(1, 7 if SANITIZERS[sanitizer] == "alone" else 3):
        assert run(program, seed, readers=SANITIZERS[sanitizer]) == ""


def test_the_table_of_keys_differs_from_a_map_in_nothing(compiler: str, tmp_path: Path) -> None:
    program = tmp_path / "table"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CORE}"]
    subprocess.run([compiler, *flags, *map(str, TABLE), "-o", str(program)], check=True, timeout=200)
    for seed in range(1, 7):
        assert run(program, seed) == ""


@pytest.fixture(scope="module")
def objects(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The drivers and the core, compiled, by the name of the source."""
    directory = tmp_path_factory.mktemp("objects")
    sources = (DRIVER, TABLE[0], *SOURCES)
    made = {source.name: directory / f"{source.stem}.o" for source in sources}
    for source in sources:
        compile_one(compiler, source, made[source.name])
    return made


def compile_one(compiler: str, source: Path, to: Path) -> None:
    subprocess.run(
        [compiler, "-std=c++20", "-O1", f"-I{CORE}", "-c", str(source), "-o", str(to)], check=True, timeout=100
    )


@pytest.mark.parametrize("what", MUTANTS)
def test_a_core_without_one_of_its_guards_differs(
    compiler: str, objects: dict[str, Path], what: str, tmp_path: Path
) -> None:
    name, guard, instead = MUTANTS[what]
    text = (CORE / name).read_text()
    assert text.count(guard) == 1
    (tmp_path / name).write_text(text.replace(guard, instead))
    compile_one(compiler, tmp_path / name, tmp_path / "mutant.o")
    program = tmp_path / "side_by_side"
    needed = TABLE if name == "key_table.cpp" else (DRIVER, *SOURCES)
    linked = [tmp_path / "mutant.o", *(objects[source.name] for source in needed if source.name != name)]
    subprocess.run([compiler, *map(str, linked), "-o", str(program), "-pthread"], check=True, timeout=100)
    assert any(run(program, seed) for seed in range(1, 7)), f"nobody notices that {what}"
