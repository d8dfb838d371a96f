// The blocks of one namespace by key: those that are listed and those that are being written.
//
// Chained, and grown by linear hashing (Litwin 1980): an insert splits one bucket at most, so no insert ever stops the
// I/O threads while a million entries move. 8 bytes per bucket, about one bucket per block; never shrinks.
#pragma once
#include <memory>
#include <string_view>
#include <vector>

#include "block.hpp"

namespace p2pkv::store {

class Table {
  public:
    // `seed` keeps whoever chooses the keys from choosing the buckets.
    explicit Table(uint64_t seed);

    Block* find(std::string_view key) const;  // null: not there
    void insert(Block& block);                // whose key is not there yet
    void erase(Block& block);                 // which is there
    size_t size() const { return size_; }

    // Every block, in no order. `visit` must not change the table.
    template <class Visit>
    void each(Visit&& visit) const {
        for (size_t i = 0; i < buckets(); ++i)
            for (Block* block = at(i); block != nullptr; block = block->next) visit(*block);
    }

  private:
    static constexpr size_t kSegment = 256;  // buckets that are allocated together: 2 KiB
    using Segment = std::unique_ptr<Block*[]>;

    uint64_t hash(std::string_view key) const;
    size_t bucket(uint64_t hash) const;
    size_t buckets() const { return mask_ + 1 + split_; }
    Block*& at(size_t bucket) const { return segments_[bucket / kSegment][bucket % kSegment]; }
    void split_one();

    const uint64_t seed_;
    std::vector<Segment> segments_;
    size_t mask_ = kSegment - 1;  // buckets of this round's beginning, less one
    size_t split_ = 0;            // how many of those have been split
    size_t size_ = 0;
};

}  // namespace p2pkv::store
