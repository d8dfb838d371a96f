// What is asked of the index, and what both halves share.
#include "prefix_index.hpp"

#include <algorithm>
#include <random>
#include <span>
#include <string>

namespace p2pkv::index {
namespace {

constexpr std::size_t kKeysMost = std::size_t{1} << 31U;  // depths are u32
constexpr std::int64_t kHoldersLimit = 256;
constexpr std::uint32_t kNoRow = ~0U;
constexpr std::size_t kNodesReserved = 65'536;

std::uint64_t random_seed() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32U) | device();
}

std::uint32_t checked_max_nodes(std::int64_t max_nodes) {
  if (max_nodes < 1 || max_nodes > kNodesLimit)
    throw std::invalid_argument("max_nodes must be within 1.." + std::to_string(kNodesLimit));
  return static_cast<std::uint32_t>(max_nodes);
}

/// The order of an answer.
bool comes_before(const Row& a, const Row& b) { return a.depth != b.depth ? a.depth > b.depth : a.node < b.node; }

bool same(std::span<const Owner> a, std::span<const Owner> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

std::size_t checked_max_entries(std::int64_t max_entries) {
  if (max_entries < 1) throw std::invalid_argument("max_entries must be at least 1");
  return static_cast<std::size_t>(max_entries);
}

}  // namespace

PrefixIndex::PrefixIndex(std::int64_t max_nodes, std::int64_t max_entries)
    : max_nodes_(checked_max_nodes(max_nodes)), max_entries_(checked_max_entries(max_entries)), table_(pages_, random_seed()) {
  nodes_.reserve(std::min<std::size_t>(max_nodes_, kNodesReserved));  // so that it does not move while readers wait
}

PrefixIndex::~PrefixIndex() {
  for (PageId id = 0; id < pages_.top(); ++id)
    if (pages_.taken(id)) pages_[id].clear();
}

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

void PrefixIndex::check_length(const Keys& keys) {
  if (keys.size() >= kKeysMost) throw std::invalid_argument("more than 2^31 keys in one call");
}

void PrefixIndex::throw_full() const {
  throw IndexFull("the index holds its limit of " + std::to_string(max_entries_) + " entries");
}

// --- who holds how much

std::vector<Row> PrefixIndex::match(const Keys& keys, bool beyond) const {
  check_length(keys);
  std::vector<Row> rows;
  {
    const std::shared_lock lock(lock_);
    rows = match_prefix(keys);
    if (beyond) match_beyond(keys, rows);
  }
  if (beyond) std::sort(rows.begin(), rows.end(), comes_before);
  return rows;
}

/// Walks the chain, run by run, with the nodes that still hold all of it; each page's owners ascend, as these nodes do.
/// Most pages have the very owners of the page before, who hold all of it: then a run is one comparison, however many.
/// The deepest nodes drop out last, so the answer is filled from its end.
std::vector<Row> PrefixIndex::match_prefix(const Keys& keys) const {
  const auto length = static_cast<std::uint32_t>(keys.size());
  std::vector<Row> live, rows, dropped;
  std::span<const Owner> last;  // owners of the page before; every live node is among them
  std::uint32_t same_since = 0;  // keys for which that has been so, in these tiers, and which no row counts yet
  const auto count_same = [&] {
    auto owner = last.begin();
    for (Row& row : live) {
      while (node_of(*owner) < row.node) ++owner;
      row.by_tier[tier_of(*owner) - 1] += same_since;
    }
    same_since = 0;
  };
  Walk walk(pages_, table_, keys);
  Run run;
  std::uint32_t walked = 0;
  while (walk.next(run, length) && run.found()) {
    const Page& page = pages_[run.page];
    const std::span<const Owner> owners(page.owner(), page.owners());
    const Mask* const masks = page.mask();
    const Mask wanted = run.mask();
    Mask all = wanted;
    for (std::size_t o = 0; o < owners.size(); ++o) all &= masks[o];
    if (run.from == 0) {
      live.resize(owners.size());
      std::size_t n = 0;
      for (std::size_t o = 0; o < owners.size(); ++o) {
        const std::uint32_t node = node_of(owners[o]);
        if ((masks[o] >> run.place & 1U) == 0 || nodes_[node].hidden) continue;
        live[n].node = node;
        live[n++].resume = length;
      }
      live.resize(n);
      last = owners;
      rows.resize(live.size());
    }
    walked = run.from + run.count;
    if (all == wanted && same(owners, last)) {
      same_since += run.count;
      last = owners;
      continue;
    }
    if (same_since != 0) count_same();
    last = owners;
    std::size_t o = 0, kept = 0;
    dropped.clear();
    for (Row& row : live) {
      while (o < owners.size() && node_of(owners[o]) < row.node) ++o;
      Mask held = 0;
      const std::size_t first = o;
      for (; o < owners.size() && node_of(owners[o]) == row.node; ++o) held |= masks[o];
      const auto has = std::min(run.count, static_cast<std::uint32_t>(std::countr_one(held >> run.place)));
      for (std::size_t k = first; has != 0 && k < o; ++k)
        row.by_tier[tier_of(owners[k]) - 1] += static_cast<std::uint32_t>(std::popcount(masks[k] & ones(run.place, has)));
      if (has == run.count) {
        live[kept++] = row;
      } else {
        dropped.push_back(row);  // and then its depth: a copy of what has just been written waits for it
        dropped.back().depth = dropped.back().held = run.from + has;
      }
    }
    if (!std::is_sorted(dropped.begin(), dropped.end(), comes_before))
      std::sort(dropped.begin(), dropped.end(), comes_before);
    std::copy(dropped.begin(), dropped.end(), rows.begin() + static_cast<std::ptrdiff_t>(kept));
    live.resize(kept);
    if (kept == 0) break;
  }
  if (same_since != 0) count_same();
  for (Row& row : live) row.depth = row.held = walked;
  std::copy(live.begin(), live.end(), rows.begin());
  return rows;
}

/// Counts every position that a node holds, and finds the first one behind its first hole.
void PrefixIndex::match_beyond(const Keys& keys, std::vector<Row>& rows) const {
  const auto length = static_cast<std::uint32_t>(keys.size());
  std::vector<std::uint32_t> row_of(nodes_.size(), kNoRow);
  for (std::uint32_t r = 0; r < rows.size(); ++r) {
    row_of[rows[r].node] = r;
    rows[r].held = 0;
  }
  Walk walk(pages_, table_, keys);
  Run run;
  while (walk.next(run, length)) {
    if (!run.found()) continue;
    const Page& page = pages_[run.page];
    for (std::uint32_t o = 0; o < page.owners(); ++o) {
      const Mask held = page.mask()[o] & run.mask();
      const std::uint32_t node = node_of(page.owner()[o]);
      if (held == 0 || nodes_[node].hidden) continue;
      std::uint32_t& r = row_of[node];
      if (r == kNoRow) {
        r = static_cast<std::uint32_t>(rows.size());
        rows.push_back({node, 0, {}, 0, length});
      }
      Row& row = rows[r];
      row.held += static_cast<std::uint32_t>(std::popcount(held));
      if (run.from + run.count <= row.depth) continue;
      const unsigned skipped = row.depth > run.from ? row.depth - run.from : 0;
      if (const Mask behind = held >> run.place >> skipped; behind != 0)
        row.resume = std::min(row.resume, run.from + skipped + static_cast<std::uint32_t>(std::countr_zero(behind)));
    }
  }
}

// --- who holds each

std::vector<std::uint32_t> PrefixIndex::holders(const Keys& keys, std::int64_t limit, std::int64_t start) const {
  check_length(keys);
  if (limit < 1 || limit > kHoldersLimit)
    throw std::invalid_argument("limit must be within 1.." + std::to_string(kHoldersLimit));
  if (keys.size() * static_cast<std::size_t>(limit) >= kKeysMost)
    throw std::invalid_argument("keys times limit must stay below 2^31 in one call");
  const std::uint32_t first = check_node(start);
  std::vector<std::uint32_t> out;
  out.reserve(keys.size() * 2 + 1);
  out.resize(keys.size() + 1);
  const auto most = static_cast<std::size_t>(limit);
  const std::size_t entries = out.size();
  const std::shared_lock lock(lock_);
  Walk walk(pages_, table_, keys);
  Run run;
  while (walk.next(run, keys.size())) {
    const Page* page = run.found() ? &pages_[run.page] : nullptr;
    const std::uint32_t middle = page == nullptr ? 0 : page->find(make_owner(first, 0));
    for (std::uint32_t n = 0; n < run.count; ++n) {
      const std::size_t before = out.size();
      const auto add = [&](std::uint32_t from, std::uint32_t to) {
        for (std::uint32_t o = from; o < to && out.size() - before < most; ++o) {
          const Owner owner = page->owner()[o];
          if ((page->mask()[o] >> (run.place + n) & 1U) != 0 && !hidden(owner))
            out.push_back((node_of(owner) << 8U) | tier_of(owner));
        }
      };
      if (page != nullptr) {
        add(middle, page->owners());
        add(0, middle);
      }
      out[run.from + n + 1] = static_cast<std::uint32_t>(out.size() - entries);
    }
  }
  return out;
}

/// Which keys of a run visible nodes hold: bit 0 is its first one.
Mask PrefixIndex::visible(const Run& run) const {
  const Page& page = pages_[run.page];
  const Mask wanted = run.mask();
  Mask seen = 0;
  for (std::uint32_t o = 0; o < page.owners() && seen != wanted; ++o)
    if ((page.mask()[o] & wanted & ~seen) != 0 && !hidden(page.owner()[o])) seen |= page.mask()[o] & wanted;
  return seen >> run.place;
}

void PrefixIndex::contains_any(const Keys& keys, unsigned char* out) const {
  const std::shared_lock lock(lock_);
  Walk walk(pages_, table_, keys);
  Run run;
  while (walk.next(run, keys.size())) {
    const Mask seen = run.found() ? visible(run) : 0;
    for (std::uint32_t n = 0; n < run.count; ++n) out[run.from + n] = seen >> n & 1U;
  }
}

std::size_t PrefixIndex::reach(const Keys& keys) const {
  const std::shared_lock lock(lock_);
  Walk walk(pages_, table_, keys);
  Run run;
  while (walk.next(run, keys.size())) {
    const auto seen = run.found() ? static_cast<std::uint32_t>(std::countr_one(visible(run))) : 0;
    if (seen < run.count) return run.from + seen;
  }
  return keys.size();
}

// --- one node, and all

std::array<std::vector<Key>, kTierMax> PrefixIndex::snapshot(std::int64_t node) const {
  const std::uint32_t slot = check_node(node);
  std::array<std::vector<Key>, kTierMax> out;
  // Writers wait, readers do not: with writer_ held nothing changes.
  const std::lock_guard writing(writer_);
  std::size_t left = slot < nodes_.size() ? nodes_[slot].count : 0;
  for (PageId id = 0; left != 0 && id < pages_.top(); ++id) {
    if (!pages_.taken(id)) continue;
    const Page& page = pages_[id];
    for (std::uint32_t o = page.find(make_owner(slot, 0)); o < page.owners() && node_of(page.owner()[o]) == slot; ++o) {
      std::vector<Key>& keys = out[tier_of(page.owner()[o]) - 1];
      for (Mask mask = page.mask()[o]; mask != 0; mask &= mask - 1, --left) keys.push_back(page.keys[std::countr_zero(mask)]);
    }
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
  const std::lock_guard writing(writer_);
  Stats stats{};
  for (const Node& node : nodes_) {
    stats.nodes += node.count != 0 ? 1 : 0;
    stats.hidden_nodes += node.hidden ? 1 : 0;
  }
  stats.keys = table_.keys();
  stats.entries = postings_;
  stats.pages = pages_.used();
  stats.capacity = table_.capacity();
  stats.bytes = pages_.bytes() + table_.bytes() + many_bytes_ + nodes_.size() * sizeof(Node);
  return stats;
}

}  // namespace p2pkv::index
