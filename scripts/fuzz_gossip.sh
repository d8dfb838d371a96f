#!/usr/bin/env bash
# libFuzzer on the gossip's protocol core, under ASan and UBSan, for SECONDS (default 60), from the corpus that is kept in
# tests/sanitize/gossip_corpus. Needs clang++ and its runtime. Usage: scripts/fuzz_gossip.sh [SECONDS]
set -euo pipefail

cd "$(dirname "$0")/.."
if ! command -v clang++ >/dev/null; then
  echo "error: libFuzzer comes with clang++, which is not installed here" >&2
  echo "hint: on Debian and Ubuntu the packages are clang and libclang-rt-dev" >&2
  exit 2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r tests/sanitize/gossip_corpus "$scratch/corpus"
mapfile -t sources < <(find p2pkv/gossip/core -name '*.cpp' ! -name 'bind_*' | sort)
clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
  -Ip2pkv/gossip/core -Ip2pkv/gossip/simulator tests/sanitize/gossip_fuzz.cpp "${sources[@]}" -o "$scratch/fuzz"
"$scratch/fuzz" -max_total_time="${1:-60}" -max_len=8192 -len_control=0 -print_final_stats=1 -verbosity=0 \
  -artifact_prefix="$scratch/" "$scratch/corpus" || { find "$scratch" -maxdepth 1 -name 'crash-*' -exec xxd {} \; ; exit 1; }
