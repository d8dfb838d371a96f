"""Looks into a built wheel: the extensions, the type marker and the licences are in it, sources and tests are not."""

from __future__ import annotations

import sys
import sysconfig
import zipfile
from pathlib import Path

NEEDED = (
    "p2pkv/__init__.py",
    "p2pkv/py.typed",
    "p2pkv/client",
    "/licenses/LICENSE",
    "/licenses/NOTICE",
    "xxhash/LICENSE",
)
EXTENSIONS = ("p2pkv/_native", "p2pkv/index/_core")
UNWANTED = (".cpp", ".hpp", ".h", ".pyc", "CMakeLists.txt")
SIZE_MAX_BYTES = 8 << 20


def complaints(wheel: Path) -> list[str]:
    """What is wrong with the wheel."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    needed = [*NEEDED, *(stem + suffix for stem in EXTENSIONS)]
    found = [f"{name} is missing" for name in needed if not any(name in entry for entry in names)]
    found += [f"{entry} does not belong in it" for entry in names if entry.endswith(UNWANTED)]
    found += [
        f"{entry} was built for another interpreter"
        for entry in names
        if entry.endswith(".so") and not entry.endswith(suffix)
    ]
    if wheel.stat().st_size > SIZE_MAX_BYTES:
        found.append(f"it is larger than {SIZE_MAX_BYTES >> 20} MiB")
    return found


def main() -> int:
    """Judge the wheels named on the command line."""
    bad = 0
    for argument in sys.argv[1:]:
        wheel = Path(argument)
        found = complaints(wheel)
        for line in found:
            print(f"{wheel.name}: {line}", file=sys.stderr)
        print(
            f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB" + ("" if found else ", contents as they should be")
        )
        bad += bool(found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
