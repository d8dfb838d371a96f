// The core of the prefix index and maps side by side: changes to both, and every answer compared. What changes comes from a
// Source: random numbers, or the bytes of a fuzzer.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "prefix_index.hpp"

namespace side_by_side {

using namespace p2pkv::index;
using Held = std::map<Key, std::uint32_t>;  // key -> tier
using Chain = std::vector<Key>;

constexpr std::uint32_t kNodes = 9;
constexpr std::size_t kChains = 10;
constexpr std::size_t kLimit = 3'000;  // entries, where a run has a bound that it meets
constexpr std::size_t kNoLimit = std::size_t{1} << 28U;

inline void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "differs: %s\n", what);
  std::abort();
}

inline Keys view(const Chain& chain) { return {chain.data(), chain.size()}; }

/// Source: operator() gives the next number.
template <typename Source>
class SideBySide {
 public:
  SideBySide(Source source, unsigned seed, std::size_t limit)
      : limit_(limit), source_(std::move(source)), index_(64, static_cast<std::int64_t>(limit)) {
    std::mt19937_64 random(seed);
    for (std::size_t i = 0; i < kChains; ++i) {
      Chain chain(random() % 700 + 1);
      for (Key& key : chain) key = random();
      if (i % 3 == 2) std::copy_n(chains_[i - 1].begin(), std::min(chains_[i - 1].size(), chain.size() / 2), chain.begin());
      chains_.push_back(chain);
    }
  }

  Source& source() { return source_; }
  const PrefixIndex& index() const { return index_; }
  const std::vector<Chain>& chains() const { return chains_; }

  void step(int number) {
    const auto node = static_cast<std::uint32_t>(below(kNodes));
    if (below(40) == 0) {
      check(index_.remove_node(node) == held_[node].size(), "entries of a node that was removed");
      held_[node].clear();
    } else if (below(30) == 0) {
      replace(node, some_keys());
    } else {
      // Every other 500 steps mostly take away: pages are gathered and freed, buckets are joined.
      const bool away = number / 500 % 2 == 1 && below(3) != 0;
      apply(node, some_keys(), away ? 0 : static_cast<std::uint32_t>(below(kTierMax + 1)));
    }
  }

  void empty() {
    for (std::uint32_t node = 0; node < kNodes; ++node) index_.remove_node(node);
    const Stats stats = index_.stats();
    check(stats.keys == 0 && stats.entries == 0 && stats.pages == 0, "an index that everybody has left");
  }

  void compare() {
    for (std::uint32_t node = 0; node < kNodes; ++node) {
      std::uint64_t sum = 0;
      for (const auto& [key, tier] : held_[node]) sum ^= entry_checksum(key, tier);
      check(index_.checksum(node) == sum && index_.count(node) == held_[node].size(), "a node's checksum or count");
    }
    for (const Chain& chain : chains_) {
      std::vector<Row> expected;
      for (std::uint32_t node = 0; node < kNodes; ++node) {
        Row row{node, 0, {}, 0, static_cast<std::uint32_t>(chain.size())};
        bool prefix = true;
        for (std::uint32_t i = 0; i < chain.size(); ++i) {
          const auto it = held_[node].find(chain[i]);
          if (it == held_[node].end()) {
            prefix = false;
            continue;
          }
          ++row.held;
          if (prefix) {
            ++row.depth;
            ++row.by_tier[it->second - 1];
          } else {
            row.resume = std::min(row.resume, i);
          }
        }
        if (row.held != 0) expected.push_back(row);
      }
      std::sort(expected.begin(), expected.end(),
                [](const Row& a, const Row& b) { return a.depth != b.depth ? a.depth > b.depth : a.node < b.node; });
      const std::vector<Row> got = index_.match(view(chain), true);
      check(got.size() == expected.size(), "how many nodes hold something of a chain");
      for (std::size_t i = 0; i < got.size(); ++i)
        check(std::memcmp(&got[i], &expected[i], sizeof(Row)) == 0, "what a node holds of a chain");
    }
  }

 private:
  std::size_t below(std::size_t end) { return source_() % end; }

  Chain some_keys() {
    const Chain& chain = chains_[below(kChains)];
    const std::size_t from = below(chain.size());
    const std::size_t count = std::min(chain.size() - from, below(4) == 0 ? 1 : below(200) + 1);
    Chain keys(chain.begin() + static_cast<std::ptrdiff_t>(from), chain.begin() + static_cast<std::ptrdiff_t>(from + count));
    if (below(5) == 0)
      for (int i = 0; i < 5; ++i) keys.push_back(chains_[below(kChains)][0]);  // some of them twice
    return keys;
  }

  std::size_t entries() const {
    std::size_t sum = 0;
    for (const Held& held : held_) sum += held.size();
    return sum;
  }

  void apply(std::uint32_t node, const Chain& keys, std::uint32_t tier) {
    Held& held = held_[node];
    std::size_t changed = 0;
    bool full = false, refused = false;
    for (const Key key : keys) {
      const auto it = held.find(key);
      if (tier == 0) {
        changed += held.erase(key);
      } else if (it == held.end() && entries() >= limit_) {
        full = true;
        break;
      } else if (it == held.end() || it->second != tier) {
        held[key] = tier;
        ++changed;
      }
    }
    std::size_t got = 0;
    try {
      got = index_.apply(node, view(keys), tier);
    } catch (const IndexFull&) {
      refused = true;
    }
    check(refused == full && (full || got == changed), "what apply changed");
  }

  void replace(std::uint32_t node, const Chain& keys) {
    Held wanted;
    for (const Key key : keys) wanted[key] = 2;
    std::size_t changed = 0;
    for (const auto& [key, tier] : wanted) changed += !held_[node].contains(key) || held_[node][key] != tier;
    for (const auto& [key, tier] : held_[node]) changed += !wanted.contains(key);
    try {
      check(index_.replace(node, {{2, view(keys)}}) == changed, "what replace changed");
      held_[node] = wanted;
    } catch (const IndexFull&) {  // some of it has been applied
      held_[node].clear();
      const auto by_tier = index_.snapshot(node);
      for (std::uint32_t tier = 1; tier <= kTierMax; ++tier)
        for (const Key key : by_tier[tier - 1]) held_[node][key] = tier;
    }
  }

  const std::size_t limit_;
  Source source_;
  PrefixIndex index_;
  std::vector<Chain> chains_;
  Held held_[kNodes];
};

}  // namespace side_by_side
