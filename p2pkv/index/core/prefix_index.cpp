#include "prefix_index.hpp"

#include <algorithm>
#include <random>

namespace p2pkv::index {
namespace {

// Slices in which writers give way to readers: some 10 to 50 us each.
constexpr std::size_t kKeysPerSlice = 256;
constexpr std::size_t kSlotsPerSlice = 4096;
// How far ahead slots are fetched: about one memory latency of lookups.
constexpr std::size_t kPrefetchAhead = 16;
constexpr std::size_t kMaxKeys = std::size_t{1} << 31U;  // depths are u32
constexpr std::int64_t kHoldersLimit = 256;
constexpr std::uint32_t kNoRow = ~0U;

std::uint64_t random_seed() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32U) | device();
}

std::uint32_t checked_max_nodes(std::int64_t max_nodes) {
  if (max_nodes < 1 || max_nodes > kNodesLimit)
    throw std::invalid_argument("max_nodes must be within 1.." + std::to_string(kNodesLimit));
  return static_cast<std::uint32_t>(max_nodes);
}

std::size_t checked_max_entries(std::int64_t max_entries) {
  if (max_entries < 1) throw std::invalid_argument("max_entries must be at least 1");
  return static_cast<std::size_t>(max_entries);
}

void check_length(const Keys& keys) {
  if (keys.size() >= kMaxKeys) throw std::invalid_argument("more than 2^31 keys in one call");
}

bool same(std::span<const Owner> a, std::span<const Owner> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

}  // namespace

PrefixIndex::PrefixIndex(std::int64_t max_nodes, std::int64_t max_entries)
    : max_nodes_(checked_max_nodes(max_nodes)), max_entries_(checked_max_entries(max_entries)), table_(random_seed()) {}

std::uint32_t PrefixIndex::check_node(std::int64_t node) const {
  if (node < 0 || node >= max_nodes_)
    throw std::invalid_argument("node " + std::to_string(node) + " is not within 0.." + std::to_string(max_nodes_ - 1));
  return static_cast<std::uint32_t>(node);
}

std::uint32_t PrefixIndex::check_tier(std::int64_t tier, std::uint32_t lowest) {
  if (tier < lowest || tier > kTierMax)
    throw std::invalid_argument("tier " + std::to_string(tier) + " is not within " + std::to_string(lowest) + "..4");
  return static_cast<std::uint32_t>(tier);
}

PrefixIndex::Node& PrefixIndex::node_locked(std::uint32_t node) {
  if (node >= nodes_.size()) nodes_.resize(node + 1);
  return nodes_[node];
}

// --- writing -----------------------------------------------------------------------------------------------------

std::size_t PrefixIndex::apply(std::int64_t node, const Keys& keys, std::int64_t tier) {
  const std::uint32_t slot = check_node(node);
  const std::uint32_t to = check_tier(tier, 0);
  check_length(keys);
  const std::lock_guard writing(writer_);
  return apply_locked(slot, keys, to);
}

std::size_t PrefixIndex::apply_locked(std::uint32_t node, const Keys& keys, std::uint32_t tier) {
  std::size_t changed = 0;
  for (std::size_t from = 0; from < keys.size(); from += kKeysPerSlice) {
    const std::size_t to = std::min(from + kKeysPerSlice, keys.size());
    const std::unique_lock lock(lock_);
    Node& state = node_locked(node);
    for (std::size_t i = from; i < std::min(from + kPrefetchAhead, to); ++i) table_.prefetch(keys[i]);
    for (std::size_t i = from; i < to; ++i) {
      if (i + kPrefetchAhead < to) table_.prefetch(keys[i + kPrefetchAhead]);
      const Key key = keys[i];
      if (tier == 0) {
        const std::uint32_t had = table_.erase(key, node);
        if (had == 0) continue;
        state.checksum ^= entry_checksum(key, had);
        --state.count;
      } else {
        // Only a new entry is refused. At the limit this costs a second look-up; below it, nothing.
        if (table_.postings() >= max_entries_ && table_.tier(key, node) == 0)
          throw IndexFull("the index holds its limit of " + std::to_string(max_entries_) + " entries");
        const std::uint32_t had = table_.set(key, node, tier);
        if (had == tier) continue;
        if (had == 0)
          ++state.count;
        else
          state.checksum ^= entry_checksum(key, had);
        state.checksum ^= entry_checksum(key, tier);
      }
      ++changed;
    }
  }
  return changed;
}

/// Takes out of `node` every entry for which stale(key) holds, up to `most`. Reads every slot: this form keeps no list
/// of a node's keys, because removals are rare and 8 bytes more per entry are not.
template <typename Stale>
std::size_t PrefixIndex::sweep_locked(std::uint32_t node, std::size_t most, Stale&& stale) {
  std::size_t removed = 0;
  const std::size_t capacity = table_.capacity();
  for (std::size_t i = 0; i < capacity && removed < most;) {
    const std::unique_lock lock(lock_);
    const std::size_t end = std::min(i + kSlotsPerSlice, capacity);
    while (i < end && removed < most) {
      const std::uint32_t had = table_.tier_at(i, node);
      const Key key = table_.key_at(i);
      if (had == 0 || !stale(key)) {
        ++i;
        continue;
      }
      table_.erase_at(i, node);  // and no ++i: the next key of the probe chain may have moved here
      nodes_[node].checksum ^= entry_checksum(key, had);
      --nodes_[node].count;
      ++removed;
    }
  }
  const std::unique_lock lock(lock_);
  table_.shrink();
  return removed;
}

std::size_t PrefixIndex::replace(std::int64_t node, const std::vector<Group>& groups) {
  const std::uint32_t slot = check_node(node);
  std::vector<Key> wanted;
  for (const auto& [tier, keys] : groups) {
    check_tier(tier, 1);
    check_length(keys);
    for (std::size_t i = 0; i < keys.size(); ++i) wanted.push_back(keys[i]);
  }
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());

  const std::lock_guard writing(writer_);
  std::size_t changed = 0;
  // New entries first, then what is left over: a reader never sees the node without something it has before and after.
  for (const auto& [tier, keys] : groups) changed += apply_locked(slot, keys, static_cast<std::uint32_t>(tier));
  std::size_t surplus = 0;
  {
    const std::unique_lock lock(lock_);
    surplus = node_locked(slot).count - wanted.size();
  }
  if (surplus != 0)
    changed += sweep_locked(slot, surplus, [&](Key key) { return !std::binary_search(wanted.begin(), wanted.end(), key); });
  return changed;
}

std::size_t PrefixIndex::remove_node(std::int64_t node) {
  const std::uint32_t slot = check_node(node);
  const std::lock_guard writing(writer_);
  std::size_t count = 0;
  {
    const std::unique_lock lock(lock_);
    if (slot >= nodes_.size()) return 0;
    count = nodes_[slot].count;
    nodes_[slot].hidden = true;  // gone for readers at once; its entries follow
  }
  const std::size_t removed = count == 0 ? 0 : sweep_locked(slot, count, [](Key) { return true; });
  const std::unique_lock lock(lock_);
  nodes_[slot] = Node{};  // the slot may be given to another node now
  return removed;
}

void PrefixIndex::hide(std::int64_t node, bool hidden) {
  const std::uint32_t slot = check_node(node);
  const std::lock_guard writing(writer_);
  const std::unique_lock lock(lock_);
  node_locked(slot).hidden = hidden;
}

// --- reading -----------------------------------------------------------------------------------------------------

std::vector<Row> PrefixIndex::match(const Keys& keys, bool beyond) const {
  check_length(keys);
  std::vector<Row> rows;
  const std::shared_lock lock(lock_);
  match_prefix(keys, rows);
  if (beyond) match_beyond(keys, rows);
  std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
    return a.depth != b.depth ? a.depth > b.depth : a.node < b.node;
  });
  return rows;
}

/// Walks the chain with the set of nodes that still hold all of it. Most neighbours have the very same owners in the
/// very same tiers: then the step is one comparison, whatever the number of owners.
void PrefixIndex::match_prefix(const Keys& keys, std::vector<Row>& rows) const {
  const auto length = static_cast<std::uint32_t>(keys.size());
  if (length == 0) return;
  for (std::size_t i = 0; i < std::min<std::size_t>(kPrefetchAhead, length); ++i) table_.prefetch(keys[i]);

  PostingTable::Inline scratch[2];
  std::span<const Owner> previous = table_.owners(keys[0], scratch[0]);
  std::vector<Row> live;
  live.reserve(previous.size());
  for (const Owner owner : previous)
    if (visible(owner)) live.push_back({node_of(owner), 0, {}, 0, length});

  std::uint32_t run = 0;  // positions before i with the same owners as position i - 1
  const auto count_run = [&] {
    auto owner = previous.begin();
    for (Row& row : live) {  // both ascend by node, and every live node is among the owners
      while (node_of(*owner) != row.node) ++owner;
      row.by_tier[tier_of(*owner) - 1] += run;
    }
  };
  std::uint32_t i = 0;
  for (; i < length && !live.empty(); ++i) {
    if (i + kPrefetchAhead < length) table_.prefetch(keys[i + kPrefetchAhead]);
    const std::span<const Owner> current = table_.owners(keys[i], scratch[(i + 1) & 1U]);
    if (i == 0 || same(current, previous)) {
      ++run;
      // An inline list lies in the scratch that the next lookup overwrites: go on with the younger copy.
      previous = current;
      continue;
    }
    count_run();
    auto owner = current.begin();
    std::size_t kept = 0;
    for (Row& row : live) {
      while (owner != current.end() && node_of(*owner) < row.node) ++owner;
      if (owner != current.end() && node_of(*owner) == row.node) {
        live[kept++] = row;
      } else {
        row.depth = row.held = i;
        rows.push_back(row);
      }
    }
    live.resize(kept);
    previous = current;
    run = 1;
  }
  if (!live.empty()) count_run();
  for (Row& row : live) {
    row.depth = row.held = i;
    rows.push_back(row);
  }
}

/// Counts every position that a node holds, and finds the first one behind its first hole.
void PrefixIndex::match_beyond(const Keys& keys, std::vector<Row>& rows) const {
  const auto length = static_cast<std::uint32_t>(keys.size());
  std::vector<std::uint32_t> row_of(nodes_.size(), kNoRow);
  for (std::uint32_t r = 0; r < rows.size(); ++r) {
    row_of[rows[r].node] = r;
    rows[r].held = 0;
  }
  for (std::uint32_t i = 0; i < length; ++i) {
    if (i + kPrefetchAhead < length) table_.prefetch(keys[i + kPrefetchAhead]);
    PostingTable::Inline scratch;
    for (const Owner owner : table_.owners(keys[i], scratch)) {
      if (!visible(owner)) continue;
      std::uint32_t& r = row_of[node_of(owner)];
      if (r == kNoRow) {
        r = static_cast<std::uint32_t>(rows.size());
        rows.push_back({node_of(owner), 0, {}, 0, length});
      }
      ++rows[r].held;
      if (i > rows[r].depth && rows[r].resume == length) rows[r].resume = i;
    }
  }
}

bool PrefixIndex::any_visible(std::span<const Owner> owners) const {
  return std::any_of(owners.begin(), owners.end(), [this](Owner owner) { return visible(owner); });
}

std::vector<std::uint32_t> PrefixIndex::holders(const Keys& keys, std::int64_t limit, std::int64_t start) const {
  check_length(keys);
  if (limit < 1 || limit > kHoldersLimit)
    throw std::invalid_argument("limit must be within 1.." + std::to_string(kHoldersLimit));
  if (keys.size() * static_cast<std::size_t>(limit) >= kMaxKeys)
    throw std::invalid_argument("keys times limit must stay below 2^31 in one call");
  const std::uint32_t first = check_node(start);
  std::vector<std::uint32_t> out;
  out.reserve(keys.size() * 2 + 1);
  out.resize(keys.size() + 1);
  const auto most = static_cast<std::size_t>(limit);
  const std::size_t entries = out.size();
  const std::shared_lock lock(lock_);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (i + kPrefetchAhead < keys.size()) table_.prefetch(keys[i + kPrefetchAhead]);
    PostingTable::Inline scratch;
    const auto owners = table_.owners(keys[i], scratch);
    const auto middle = std::lower_bound(owners.begin(), owners.end(), make_owner(first, 0));
    const std::size_t before = out.size();
    const auto take = [&](auto from, auto to) {
      for (; from != to && out.size() - before < most; ++from)
        if (visible(*from)) out.push_back((node_of(*from) << 8U) | tier_of(*from));
    };
    take(middle, owners.end());
    take(owners.begin(), middle);
    out[i + 1] = static_cast<std::uint32_t>(out.size() - entries);
  }
  return out;
}

void PrefixIndex::contains_any(const Keys& keys, unsigned char* out) const {
  const std::shared_lock lock(lock_);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (i + kPrefetchAhead < keys.size()) table_.prefetch(keys[i + kPrefetchAhead]);
    PostingTable::Inline scratch;
    out[i] = any_visible(table_.owners(keys[i], scratch)) ? 1 : 0;
  }
}

std::size_t PrefixIndex::reach(const Keys& keys) const {
  const std::shared_lock lock(lock_);
  std::size_t i = 0;
  for (; i < keys.size(); ++i) {
    if (i + kPrefetchAhead < keys.size()) table_.prefetch(keys[i + kPrefetchAhead]);
    PostingTable::Inline scratch;
    if (!any_visible(table_.owners(keys[i], scratch))) break;
  }
  return i;
}

std::array<std::vector<Key>, kTierMax> PrefixIndex::snapshot(std::int64_t node) const {
  const std::uint32_t slot = check_node(node);
  std::array<std::vector<Key>, kTierMax> out;
  // Writers wait, readers do not: with writer_ held nothing changes, so the table can be read without lock_.
  const std::lock_guard writing(writer_);
  std::size_t left = slot < nodes_.size() ? nodes_[slot].count : 0;
  for (std::size_t i = 0; left != 0 && i < table_.capacity(); ++i) {
    const std::uint32_t tier = table_.tier_at(i, slot);
    if (tier == 0) continue;
    out[tier - 1].push_back(table_.key_at(i));
    --left;
  }
  return out;
}

std::uint64_t PrefixIndex::checksum(std::int64_t node) const {
  const std::uint32_t slot = check_node(node);
  const std::shared_lock lock(lock_);
  return slot < nodes_.size() ? nodes_[slot].checksum : 0;
}

std::size_t PrefixIndex::count(std::int64_t node) const {
  const std::uint32_t slot = check_node(node);
  const std::shared_lock lock(lock_);
  return slot < nodes_.size() ? nodes_[slot].count : 0;
}

std::uint32_t PrefixIndex::top() const {
  const std::shared_lock lock(lock_);
  return static_cast<std::uint32_t>(nodes_.size());
}

Stats PrefixIndex::stats() const {
  const std::shared_lock lock(lock_);
  Stats stats{};
  for (const Node& node : nodes_) {
    stats.nodes += node.count != 0 ? 1 : 0;
    stats.hidden_nodes += node.hidden ? 1 : 0;
  }
  stats.keys = table_.keys();
  stats.shared_keys = table_.shared_keys();
  stats.postings = table_.postings();
  stats.capacity = table_.capacity();
  stats.bytes = table_.bytes() + nodes_.capacity() * sizeof(Node);
  return stats;
}

}  // namespace p2pkv::index
