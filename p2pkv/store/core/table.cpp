#include "table.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace p2pkv::store {

Table::Table(uint64_t seed) : seed_(seed) { segments_.push_back(std::make_unique<Block*[]>(kSegment)); }

uint64_t Table::hash(std::string_view key) const { return XXH3_64bits_withSeed(key.data(), key.size(), seed_); }

size_t Table::bucket(uint64_t hash) const {
    const size_t unsplit = hash & mask_;
    return unsplit < split_ ? hash & (2 * mask_ + 1) : unsplit;
}

Block* Table::find(std::string_view key) const {
    for (Block* block = at(bucket(hash(key))); block != nullptr; block = block->next)
        if (block->key() == key) return block;
    return nullptr;
}

void Table::insert(Block& block) {
    if (size_ == buckets()) split_one();
    Block*& head = at(bucket(hash(block.key())));
    block.next = head;
    head = &block;
    ++size_;
}

void Table::erase(Block& block) {
    Block** link = &at(bucket(hash(block.key())));
    while (*link != &block) link = &(*link)->next;
    *link = block.next;
    block.next = nullptr;
    --size_;
}

void Table::split_one() {
    if (buckets() % kSegment == 0) segments_.push_back(std::make_unique<Block*[]>(kSegment));
    Block** stay = &at(split_);
    Block* block = *stay;
    Block** go = &at(buckets());
    const size_t bit = mask_ + 1;
    while (block != nullptr) {
        Block**& end = (hash(block->key()) & bit) != 0 ? go : stay;
        *end = block;
        end = &block->next;
        block = block->next;
    }
    *stay = *go = nullptr;
    if (++split_ > mask_) {
        mask_ = 2 * mask_ + 1;
        split_ = 0;
    }
}

}  // namespace p2pkv::store
