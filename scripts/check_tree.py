"""Refuses files that tell about the machine they were written on: its paths, and where its packages come from.

A clone must build wherever pip is configured to find packages, so no file may name an index, a link page or a path
outside the repository. Run by `make lint` and by the pre-commit hook.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = ("third_party/", "LICENSE")
SIZE_MAX_BYTES = 2 << 20

MACHINE_PATH = re.compile(r"(?<![\w.$}~-])/(?:work|home/\w+|root|Users/\w+)/\w+")
PACKAGE_SOURCE = re.compile(r"^\s*(?:--(?:index-url|extra-index-url|find-links|trusted-host)|-i\s|-f\s)", re.MULTILINE)
REMOTE_IN_REQUIREMENTS = re.compile(r"https?://|file://")


def tracked_files() -> list[Path]:
    """Every file that git tracks or would track; without git, every file outside the usual build outputs."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [name for name in listed.stdout.decode().split("\0") if name]
    else:
        hidden = re.compile(r"(^|/)(\.venv|\.git/|build/|site/|results/|__pycache__|\.\w+_cache/|\.hypothesis/)")
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
        names = [name for name in names if not hidden.search(name)]
    return [ROOT / name for name in sorted(names) if not name.startswith(SKIPPED)]


def complaints(path: Path) -> list[str]:
    """What is wrong with one file, as lines that an editor can jump to."""
    name = path.relative_to(ROOT)
    if not path.is_file():
        return []
    if path.stat().st_size > SIZE_MAX_BYTES:
        return [f"{name}: larger than {SIZE_MAX_BYTES >> 20} MiB"]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    found = []
    patterns = [(MACHINE_PATH, "a path of one machine")]
    if name.parts[0] == "requirements":
        patterns += [(PACKAGE_SOURCE, "a package source"), (REMOTE_IN_REQUIREMENTS, "an address")]
    for pattern, what in patterns:
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{name}:{line}: {what}: {match[0].strip()!r}")
    return found


def main() -> int:
    """Print every complaint; the exit code says whether there was one."""
    found = [line for path in tracked_files() for line in complaints(path)]
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
