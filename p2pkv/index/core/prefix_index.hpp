// The prefix index: the posting table, what is known per node, and the questions that are asked of it.
//
// Threads: any number of readers beside writers; writers are serialised by a mutex of their own. Writes and removals
// take the readers' lock in short slices, so a long batch never stops a reader for long, and a reader can see half a
// batch: the index is a hint for where to ask. Only growth of the table still holds the lock for as long as it takes.
//
// Errors: std::invalid_argument for arguments that can never be right, IndexFull for the bound on entries,
// std::bad_alloc. All of them leave the index consistent.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "postings.hpp"

namespace p2pkv::index {

static_assert(std::endian::native == std::endian::little, "packed keys are little-endian on the wire and here");

class IndexFull : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A caller's packed little-endian u64 keys. Borrowed, may be unaligned (a slice of a frame): read through memcpy.
class Keys {
 public:
  Keys(const void* data, std::size_t size) : data_(static_cast<const unsigned char*>(data)), size_(size) {}
  std::size_t size() const { return size_; }
  Key operator[](std::size_t i) const {
    Key key;
    std::memcpy(&key, data_ + i * sizeof(Key), sizeof(Key));
    return key;
  }

 private:
  const unsigned char* data_;
  std::size_t size_;
};

/// One node's answer to match(), as it is handed to Python: eight u32. See p2pkv/index/prefix.py for the meaning.
struct Row {
  std::uint32_t node;
  std::uint32_t depth;
  std::array<std::uint32_t, kTierMax> by_tier;
  std::uint32_t held;
  std::uint32_t resume;
};
static_assert(sizeof(Row) == 32);

struct Stats {
  std::size_t nodes, hidden_nodes, keys, shared_keys, postings, capacity, bytes;
};

class PrefixIndex {
 public:
  using Group = std::pair<std::int64_t, Keys>;  // tier, keys

  PrefixIndex(std::int64_t max_nodes, std::int64_t max_entries);

  std::size_t apply(std::int64_t node, const Keys& keys, std::int64_t tier);
  std::size_t replace(std::int64_t node, const std::vector<Group>& groups);
  std::size_t remove_node(std::int64_t node);
  void hide(std::int64_t node, bool hidden);

  std::vector<Row> match(const Keys& keys, bool beyond) const;
  std::vector<std::uint32_t> holders(const Keys& keys, std::int64_t limit, std::int64_t start) const;
  void contains_any(const Keys& keys, unsigned char* out) const;
  std::size_t reach(const Keys& keys) const;

  std::array<std::vector<Key>, kTierMax> snapshot(std::int64_t node) const;
  std::uint64_t checksum(std::int64_t node) const;
  std::size_t count(std::int64_t node) const;
  std::uint32_t top() const;
  Stats stats() const;

 private:
  struct Node {
    std::uint64_t checksum = 0;
    std::size_t count = 0;
    bool hidden = false;
  };

  std::uint32_t check_node(std::int64_t node) const;
  static std::uint32_t check_tier(std::int64_t tier, std::uint32_t lowest);
  bool visible(Owner owner) const { return !nodes_[node_of(owner)].hidden; }
  bool any_visible(std::span<const Owner> owners) const;

  // With writer_ held; lock_ is taken inside, slice by slice.
  std::size_t apply_locked(std::uint32_t node, const Keys& keys, std::uint32_t tier);
  template <typename Stale>
  std::size_t sweep_locked(std::uint32_t node, std::size_t most, Stale&& stale);
  Node& node_locked(std::uint32_t node);  // with lock_ held for writing

  // With lock_ held for reading.
  void match_prefix(const Keys& keys, std::vector<Row>& rows) const;
  void match_beyond(const Keys& keys, std::vector<Row>& rows) const;

  const std::uint32_t max_nodes_;
  const std::size_t max_entries_;
  mutable std::mutex writer_;        // taken before lock_; readers never take it, except snapshot()
  mutable std::shared_mutex lock_;
  PostingTable table_;
  std::vector<Node> nodes_;
};

}  // namespace p2pkv::index
