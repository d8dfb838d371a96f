#!/usr/bin/env bash
# libFuzzer on the core of the prefix index, under ASan and UBSan, for SECONDS (default 60). Needs clang++ and its runtime.
# Usage: scripts/fuzz_index.sh [SECONDS]
set -euo pipefail

cd "$(dirname "$0")/.."
if ! command -v clang++ >/dev/null; then
  echo "error: libFuzzer comes with clang++, which is not installed here" >&2
  echo "hint: on Debian and Ubuntu the packages are clang and libclang-rt-dev" >&2
  exit 2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/corpus"
mapfile -t sources < <(find p2pkv/index/core -name '*.cpp' ! -name module.cpp ! -name token_chain.cpp | sort)
clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Ip2pkv/index/core \
  tests/sanitize/index_fuzz.cpp "${sources[@]}" -o "$scratch/fuzz" -pthread
"$scratch/fuzz" -max_total_time="${1:-60}" -max_len=4096 -len_control=0 -print_final_stats=1 -verbosity=0 \
  -artifact_prefix="$scratch/" "$scratch/corpus"
