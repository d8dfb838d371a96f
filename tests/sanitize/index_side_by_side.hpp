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

  /// Every other node, in pieces, into an index of its own; and the same bytes with one that is wrong, into another.
  void dump() {
    std::vector<std::uint32_t> from;
    std::vector<std::int64_t> to;
    for (std::uint32_t node = below(2); node < kNodes; node += 2) {
      from.push_back(node);
      to.push_back(kNodes - node);
    }
    std::vector<unsigned char> all;
    std::size_t start = 0;
    do {
      std::vector<unsigned char> piece;
      start = index_.dump_pages(from, start, below(4'000) + 1, piece);
      all.insert(all.end(), piece.begin(), piece.end());
    } while (start != 0);
    PrefixIndex other(64, kNoLimit);
    const std::size_t cut = all.empty() ? 0 : below(all.size());
    const std::size_t used = other.load_pages(all.data(), cut, to);
    check(used <= cut && other.load_pages(all.data() + used, all.size() - used, to) == all.size() - used, "whole records");
    for (std::size_t n = 0; n < from.size(); ++n) {
      Held held;
      const auto by_tier = other.snapshot(to[n]);
      for (std::uint32_t tier = 1; tier <= kTierMax; ++tier)
        for (const Key key : by_tier[tier - 1]) held[key] = tier;
      check(held == held_[from[n]] && other.count(to[n]) == held.size(), "what a dump says of a node");
    }
    if (all.empty()) return;
    all[below(all.size())] ^= static_cast<unsigned char>(1U << below(8));
    PrefixIndex damaged(64, 1'000);
    try {
      damaged.load_pages(all.data(), all.size(), to);
    } catch (const std::invalid_argument&) {
    } catch (const IndexFull&) {
    }
    for (std::uint32_t node = 0; node < 64; ++node) damaged.remove_node(node);
    check(damaged.stats().entries == 0 && damaged.stats().pages == 0, "an index after a dump that is damaged");
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
    if (below(4) == 0) dump();
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
