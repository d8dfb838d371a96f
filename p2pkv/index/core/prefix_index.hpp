// The prefix index: which nodes hold which keys, and the questions that are asked of it.
//
// Threads: any number of readers beside writers; writers are serialised by a mutex of their own. A write takes the
// readers' lock in slices of a few microseconds, so a reader can see half a batch: the index is a hint for where to ask.
// Nothing is ever copied or rehashed as a whole; memory is faulted in before the lock is taken.
//
// Errors: std::invalid_argument for arguments that can never be right, IndexFull for the bound on entries,
// std::bad_alloc. All of them leave the index consistent.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "key_table.hpp"
#include "keys.hpp"
#include "pages.hpp"
#include "readers_lock.hpp"
#include "walk.hpp"

namespace p2pkv::index {

class IndexFull : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
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
  std::size_t nodes, hidden_nodes, keys, entries, pages, capacity, bytes;
};

class PrefixIndex {
 public:
  using Group = std::pair<std::int64_t, Keys>;  // tier, keys

  PrefixIndex(std::int64_t max_nodes, std::int64_t max_entries);
  ~PrefixIndex();
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  std::size_t apply(std::int64_t node, const Keys& keys, std::int64_t tier);
  std::size_t replace(std::int64_t node, const std::vector<Group>& groups);
  std::size_t remove_node(std::int64_t node);
  void hide(std::int64_t node, bool hidden);

  std::vector<Row> match(const Keys& keys, bool beyond) const;
  std::vector<std::uint32_t> holders(const Keys& keys, std::int64_t limit, std::int64_t start) const;
  void contains_any(const Keys& keys, unsigned char* out) const;
  std::size_t reach(const Keys& keys) const;

  std::array<std::vector<Key>, kTierMax> snapshot(std::int64_t node) const;
  std::size_t dump_pages(const std::vector<std::uint32_t>& slots, std::size_t from, std::size_t bytes_most,
                         std::vector<unsigned char>& out) const;
  std::size_t load_pages(const unsigned char* data, std::size_t size, const std::vector<std::int64_t>& slots);
  std::uint64_t checksum(std::int64_t node) const;
  std::size_t count(std::int64_t node) const;
  std::uint32_t top() const;
  Stats stats() const;

 private:
  struct Node {
    std::uint64_t checksum = 0;
    std::size_t count = 0;
    PageId open = kNoPage;  // where its new keys go
    bool hidden = false;
  };

  std::uint32_t check_node(std::int64_t node) const;
  static std::uint32_t check_tier(std::int64_t tier, std::uint32_t lowest);
  static void check_length(const Keys& keys);
  bool hidden(Owner owner) const { return nodes_[node_of(owner)].hidden; }

  // With writer_ held; lock_ is taken inside, slice by slice.
  std::size_t apply_locked(std::uint32_t node, const Keys& keys, std::uint32_t tier);
  template <typename Stale>
  std::size_t sweep_locked(std::uint32_t node, Stale&& stale);
  void prepare(bool adds);
  [[noreturn]] void throw_full() const;

  // With lock_ held for writing.
  Node& node_locked(std::uint32_t node);
  std::size_t put(std::uint32_t node, PageId page, Mask mask, std::uint32_t tier);
  std::size_t take(std::uint32_t node, PageId page, Mask mask);
  Run append(std::uint32_t node, const Keys& keys, std::size_t from, std::size_t end);
  void bury(PageId page);
  bool gather(PageId page) noexcept;
  void free(PageId page);
  void make_room(Page& page, std::uint32_t more);
  void set(Page& page, std::uint32_t i, Mask mask);

  // With lock_ held for reading.
  Mask visible(const Run& run) const;
  std::vector<Row> match_prefix(const Keys& keys) const;
  void match_beyond(const Keys& keys, std::vector<Row>& rows) const;

  const std::uint32_t max_nodes_;
  const std::size_t max_entries_;
  mutable std::mutex writer_;  // taken before lock_; readers never take it, except snapshot() and stats()
  mutable ReadersLock lock_;
  Pages pages_;
  KeyTable table_;
  std::vector<Node> nodes_;
  std::size_t postings_ = 0;   // (node, key) entries
  std::size_t many_bytes_ = 0;  // of owners that do not lie in their pages
  PageId gathering_ = kNoPage;  // where keys of pages that are nearly empty go
};

}  // namespace p2pkv::index
