"""The prefix index's C++ core under sanitizers: built from its sources, beside maps, with and without readers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

HERE = Path(__file__).parent
CORE = Path(__file__).parents[2] / "p2pkv" / "index" / "core"
SOURCES = [
    HERE / "index_side_by_side.cpp",
    *(p for p in sorted(CORE.glob("*.cpp")) if p.name not in ("module.cpp", "token_chain.cpp")),
]
SANITIZERS = {"address,undefined": "alone", "thread": "threads"}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_core_differs_from_maps_in_nothing_and_breaks_no_rule_of_the_language(
    sanitizer: str, tmp_path: Path
) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("NO C++ COMPILER: the index's core is not tested under sanitizers")
    program = tmp_path / "side_by_side"
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{CORE}"]
    subprocess.run([compiler, *flags, *map(str, SOURCES), "-o", str(program), "-pthread"], check=True, timeout=200)
    for seed in range(1, 7 if SANITIZERS[sanitizer] == "alone" else 3):
        ran = subprocess.run(
            [str(program), str(seed), "2000", SANITIZERS[sanitizer]], capture_output=True, text=True, timeout=100
        )
        assert ran.returncode == 0, f"seed {seed}: {ran.stderr[-4000:]}"
