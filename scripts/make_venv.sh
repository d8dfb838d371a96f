#!/usr/bin/env bash
# Makes a virtual environment with the first Python >= 3.11 that works: $PYTHON if set, else the usual names.
# Usage: scripts/make_venv.sh DIRECTORY
set -euo pipefail

directory=$1
good='import sys; raise SystemExit(sys.version_info < (3, 11))'

chosen=
for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
  if command -v "$candidate" >/dev/null && "$candidate" -c "$good" 2>/dev/null; then
    chosen=$candidate
    break
  fi
done
if [ -z "$chosen" ]; then
  echo "error: no Python >= 3.11 found (tried: ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14})" >&2
  echo "hint: install one, or name it: make setup PYTHON=/path/to/python3.11" >&2
  exit 2
fi
echo "setup: making $directory with $("$chosen" --version)"
if ! "$chosen" -m venv "$directory"; then
  echo "hint: Debian and Ubuntu keep venv in a package of its own: python3-venv" >&2
  exit 2
fi
