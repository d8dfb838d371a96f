// An intrusive list of blocks: the order of eviction, and the order in which a namespace's blocks were put.
#pragma once
#include "block.hpp"

namespace p2pkv::store {

template <Links Block::*links>
class List {
  public:
    Block* front() const { return first_; }
    Block* back() const { return last_; }
    static Block* after(const Block& block) { return (block.*links).after; }
    static Block* before(const Block& block) { return (block.*links).before; }
    size_t size() const { return size_; }

    void push_back(Block& block) {
        (block.*links) = {last_, nullptr};
        (last_ == nullptr ? first_ : (last_->*links).after) = &block;
        last_ = &block;
        ++size_;
    }
    void erase(Block& block) {
        const auto [before, after] = block.*links;
        (before == nullptr ? first_ : (before->*links).after) = after;
        (after == nullptr ? last_ : (after->*links).before) = before;
        (block.*links) = {};
        --size_;
    }
    void move_to_back(Block& block) {
        if (&block == last_) return;
        erase(block);
        push_back(block);
    }

  private:
    Block* first_ = nullptr;
    Block* last_ = nullptr;
    size_t size_ = 0;
};

}  // namespace p2pkv::store
