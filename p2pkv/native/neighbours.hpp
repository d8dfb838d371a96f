// Other agents of this host whose memory we may read: each one's arena, by its directory, as an engine of it does.
//
// A block is copied out of the neighbour's arena and checksummed on the way; it counts if its entry was there all along
// (directory_layout.hpp) and the bytes are what the entry says. Nobody is asked, and nothing is held.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "directory_reader.hpp"
#include "mapping.hpp"

namespace p2pkv {

class Neighbour {
  public:
    // Three files of an agent: of its arena, and its directory's table and marks. They are mapped, and stay the caller's.
    // Throws std::system_error, std::invalid_argument.
    Neighbour(int arena_fd, size_t arena_bytes, int table_fd, size_t table_bytes, int marks_fd, size_t marks_bytes)
        : arena_(arena_fd, arena_bytes, false),
          table_(table_fd, table_bytes, false),
          marks_(marks_fd, marks_bytes, true),
          directory(table_.data(), table_.size(), marks_.data(), marks_.size(), arena_.data(), arena_.size()) {}

  private:
    const Mapping arena_, table_, marks_;

  public:
    const DirectoryReader directory;
};

// By node. Thread-safe; one that is removed lives on until nobody reads it any more.
class Neighbours {
  public:
    void set(uint64_t node, std::shared_ptr<const Neighbour> neighbour) {
        std::lock_guard lock(mutex_);
        by_node_[node] = std::move(neighbour);
    }
    void remove(uint64_t node) {
        std::lock_guard lock(mutex_);
        by_node_.erase(node);
    }
    std::shared_ptr<const Neighbour> find(uint64_t node) const {
        std::lock_guard lock(mutex_);
        const auto it = by_node_.find(node);
        return it == by_node_.end() ? nullptr : it->second;
    }

  private:
    mutable std::mutex mutex_;
    std::unordered_map<uint64_t, std::shared_ptr<const Neighbour>> by_node_;
};

}  // namespace p2pkv
