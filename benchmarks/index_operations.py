"""Issue 3, point 6: random operations on the index's core and on its reference, side by side, a million of them.

    python benchmarks/index_operations.py [--operations 1000000]          # exit code 0: no answer differed
    python benchmarks/index_operations.py --without-holes                 # exit code 0: a difference was found

The state machine is that of the unit tests (tests/unit/index/test_prefix_against_reference.py), where it runs for some
2,400 operations; after each one both are compared as a whole. ``--without-holes`` builds the core anew, in a temporary
directory, with what ends a run of blocks at the first hole taken out.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CORE = "p2pkv.index._core"
STEPS = 100


def build_without_holes(directory: Path) -> Path:
    """The extension with a guard taken out."""
    from tests.sanitize.test_index_core import MUTANTS

    name, guard, instead = MUTANTS["holes are not looked at"]
    for part in ("CMakeLists.txt", "p2pkv/native", "p2pkv/store/core", "p2pkv/index/core", "third_party"):
        to = directory / part
        to.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, to)
    source = directory / "p2pkv/index/core" / name
    source.write_text(source.read_text().replace(guard, instead))
    cmake = str(Path(sys.executable).parent / "cmake")
    build = directory / "build"
    subprocess.run(
        [cmake, "-S", str(directory), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run([cmake, "--build", str(build), "--target", "_core"], check=True, stdout=subprocess.DEVNULL)
    [made] = build.glob("_core*.so")
    return made


def load(extension: Path) -> None:
    """Have this one be imported as the core."""
    spec = importlib.util.spec_from_file_location(CORE, extension)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[CORE] = module
    spec.loader.exec_module(module)


def run(operations: int) -> tuple[int, str]:
    """Operations that were done, and what differed, if anything."""
    from hypothesis import HealthCheck, settings
    from hypothesis.stateful import run_state_machine_as_test

    from tests.unit.index.test_prefix_against_reference import SideBySide

    chosen: Any = settings(
        max_examples=200,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,  # one is enough, and is an AssertionError then
    )
    began = time.monotonic()
    while SideBySide.operations < operations:
        try:
            run_state_machine_as_test(SideBySide, settings=chosen)
        except AssertionError as error:
            return SideBySide.operations, str(error).partition("\n")[0] or "an answer differed"
        done = SideBySide.operations
        print(f"{done} operations, {done / (time.monotonic() - began):.0f}/s", file=sys.stderr, flush=True)
    return SideBySide.operations, ""


def main() -> int:
    """Run; the exit code says whether it came out as it should."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--without-holes", action="store_true")
    options = parser.parse_args()
    if not options.without_holes:
        done, difference = run(options.operations)
        print(f"{done} operations, differences: {difference or 'none'}")
        return 1 if difference else 0
    with tempfile.TemporaryDirectory() as directory:
        load(build_without_holes(Path(directory)))
        done, difference = run(options.operations)
    print(f"without the handling of holes: {done} operations, differences: {difference or 'NONE'}")
    return 0 if difference else 1


if __name__ == "__main__":
    sys.exit(main())
