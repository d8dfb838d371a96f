"""The gossip's protocol core under sanitizers: what is kept in the corpus, and thousands of mutations of it.

`make fuzz-gossip` searches further, with libFuzzer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

HERE = Path(__file__).parent
GOSSIP = HERE.parents[1] / "p2pkv" / "gossip"
CORPUS = sorted((HERE / "gossip_corpus").iterdir())
SOURCES = [path for path in sorted((GOSSIP / "core").glob("*.cpp")) if not path.name.startswith("bind")]
ROUNDS = 3_000


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("NO C++ COMPILER: the gossip's core is not tested by itself")
    program = tmp_path_factory.mktemp("fuzz") / "fuzz"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DMAIN"]
    include = [f"-I{GOSSIP / 'core'}", f"-I{GOSSIP / 'simulator'}"]
    sources = [str(HERE / "gossip_fuzz.cpp"), *map(str, SOURCES)]
    subprocess.run([compiler, *flags, *include, *sources, "-o", str(program)], check=True, timeout=250)
    return program


@pytest.mark.parametrize("file", CORPUS, ids=lambda path: path.name)
def test_nothing_that_is_said_breaks_the_core(fuzzed: Path, file: Path) -> None:
    command = [str(fuzzed), str(ROUNDS), str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr[-4_000:]
