// Least recently used goes first, among the live blocks of one slot size. It decides, it never frees.
//
// A held block that a search meets at the cold end is being read right now, which is a use: it moves to the hot end.
// So a long lease on many cold blocks is walked over once per round, not once per eviction.
#pragma once
#include "list.hpp"

namespace p2pkv::store {

class Lru {
  public:
    // Not enabled: keeps no order and offers no victim, so a full store answers no_space.
    explicit Lru(bool enabled) : enabled_(enabled) {}

    void insert(Block& block) {
        if (enabled_) order_.push_back(block);
    }
    void access(Block& block) {
        if (enabled_) order_.move_to_back(block);
    }
    void remove(Block& block) {
        if (enabled_) order_.erase(block);
    }
    // The block that should go first of those that are not held; null if there is none.
    template <class Held>
    Block* victim(Held&& held) {
        for (size_t n = order_.size(); n != 0; --n) {
            Block* block = order_.front();
            if (!held(*block)) return block;
            order_.move_to_back(*block);
        }
        return nullptr;
    }
    // Show up to `most` victims in the order in which they should go, until `wanted` says true of one.
    template <class Held, class Wanted>
    void search(size_t most, Held&& held, Wanted&& wanted) {
        std::vector<Block*> in_use;
        for (Block* block = order_.front(); block != nullptr && most != 0; block = order_.after(*block)) {
            if (held(*block)) {
                in_use.push_back(block);
            } else {
                --most;
                if (wanted(*block)) break;
            }
        }
        for (Block* block : in_use) order_.move_to_back(*block);
    }
    // From the one that goes last to the one that goes first; null: there is no (further) one.
    Block* hottest() const { return order_.back(); }
    static Block* colder(const Block& block) { return List<&Block::order>::before(block); }
    bool enabled() const { return enabled_; }
    size_t size() const { return order_.size(); }

  private:
    const bool enabled_;
    List<&Block::order> order_;
};

}  // namespace p2pkv::store
