#!/usr/bin/env bash
# libFuzzer on one of the C++ cores, under ASan and UBSan, for SECONDS (default 60). The gossip's begins from the corpus that
# is kept in tests/sanitize. Needs clang++ and its runtime. Usage: scripts/fuzz.sh index|gossip [SECONDS]
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
case "${1:-}" in
  index)
    mapfile -t sources < <(find p2pkv/index/core -name '*.cpp' ! -name module.cpp ! -name token_chain.cpp | sort)
    include=(-Ip2pkv/index/core)
    longest=4096
    ;;
  gossip)
    mapfile -t sources < <(find p2pkv/gossip/core -name '*.cpp' ! -name 'bind_*' | sort)
    include=(-Ip2pkv/gossip/core -Ip2pkv/gossip/simulator)
    longest=8192
    cp tests/sanitize/gossip_corpus/* "$scratch/corpus"
    ;;
  *)
    echo "usage: scripts/fuzz.sh index|gossip [SECONDS]" >&2
    exit 2
    ;;
esac
clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all "${include[@]}" \
  "tests/sanitize/$1_fuzz.cpp" "${sources[@]}" -o "$scratch/fuzz" -pthread
"$scratch/fuzz" -max_total_time="${2:-60}" -max_len="$longest" -len_control=0 -print_final_stats=1 -verbosity=0 \
  -artifact_prefix="$scratch/" "$scratch/corpus" || { find "$scratch" -maxdepth 1 -name 'crash-*' -exec xxd {} \; ; exit 1; }
