// What simulated nodes keep entries in: whole sets for small cells, and for large ones the checksum of each set alone.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "../../index/core/entries.hpp"
#include "../../index/core/keys.hpp"

namespace p2pkv::sim {

using Set = std::unordered_map<std::uint64_t, std::uint32_t>;  // key -> tier

/// Every entry, by slot.
class WholeSets final : public index::Entries {
 public:
  explicit WholeSets(std::size_t slots) : sets_(slots), hidden_(slots, false) {}

  bool apply(std::uint32_t slot, const void* keys, std::size_t count, std::uint32_t tier) override {
    const index::Keys view(keys, count);
    for (std::size_t i = 0; i < count; ++i) {
      if (tier == 0)
        sets_[slot].erase(view[i]);
      else
        sets_[slot][view[i]] = tier;
    }
    return true;
  }
  bool replace(std::uint32_t slot, const std::vector<index::TierKeys>& groups) override {
    sets_[slot].clear();
    for (const auto& group : groups) apply(slot, group.keys, group.count, group.tier);
    return true;
  }
  void remove(std::uint32_t slot) override {
    sets_[slot].clear();
    hidden_[slot] = false;
  }
  void hide(std::uint32_t slot, bool hidden) override { hidden_[slot] = hidden; }
  std::uint64_t checksum(std::uint32_t slot) const override {
    std::uint64_t sum = 0;
    for (const auto& [key, tier] : sets_[slot]) sum ^= index::entry_checksum(key, tier);
    return sum;
  }
  std::size_t count(std::uint32_t slot) const override { return sets_[slot].size(); }
  void list(std::uint32_t slot, std::vector<std::uint64_t> (&by_tier)[4]) const override {
    for (const auto& [key, tier] : sets_[slot]) by_tier[tier - 1].push_back(key);
  }

  const Set& set(std::uint32_t slot) const { return sets_[slot]; }
  bool hidden(std::uint32_t slot) const { return hidden_[slot]; }

 private:
  std::vector<Set> sets_;
  std::vector<bool> hidden_;
};

/// Only the checksum and the size of each set, for a thousand nodes that each keep a thousand of them.
///
/// A key's tier is in its lowest three bits, so that its removal can be reckoned without looking it up; a key that is
/// applied twice, or removed without being there, shows in the checksum as any other error does. Whole sets, for
/// snapshots, come from what the simulator knows of the owner at that point.
class SumSets final : public index::Entries {
 public:
  using Lister = std::function<void(std::uint32_t slot, std::vector<std::uint64_t> (&by_tier)[4])>;

  SumSets(std::size_t slots, Lister lister) : sums_(slots), lister_(std::move(lister)) {}

  bool apply(std::uint32_t slot, const void* keys, std::size_t count, std::uint32_t tier) override {
    const index::Keys view(keys, count);
    Sum& sum = sums_[slot];
    for (std::size_t i = 0; i < count; ++i)
      sum.checksum ^= index::entry_checksum(view[i], static_cast<std::uint32_t>(view[i] & 7U));
    sum.count += tier == 0 ? -count : count;
    return true;
  }
  bool replace(std::uint32_t slot, const std::vector<index::TierKeys>& groups) override {
    sums_[slot] = {};
    for (const auto& group : groups) apply(slot, group.keys, group.count, group.tier);
    return true;
  }
  void remove(std::uint32_t slot) override { sums_[slot] = {}; }
  void hide(std::uint32_t, bool) override {}
  std::uint64_t checksum(std::uint32_t slot) const override { return sums_[slot].checksum; }
  std::size_t count(std::uint32_t slot) const override { return sums_[slot].count; }
  void list(std::uint32_t slot, std::vector<std::uint64_t> (&by_tier)[4]) const override { lister_(slot, by_tier); }

 private:
  struct Sum {
    std::uint64_t checksum = 0;
    std::size_t count = 0;
  };
  std::vector<Sum> sums_;
  Lister lister_;
};

}  // namespace p2pkv::sim
