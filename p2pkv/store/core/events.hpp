// Changes of ownership that wait for the ownership log: in order, and bounded.
//
// Bounded without losing what matters: when the queue is long, only the last event of each key is kept, and none of a key
// that came and went, or went and came. What remains is at most one event per block in the store and per block that the
// reader knows of.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace p2pkv::store {

enum class Tier : uint8_t { gone = 0, dram = 2 };  // p2pkv.types.Tier

struct Events {
    std::vector<uint64_t> keys;
    std::vector<Tier> tiers;  // where that block is from then on
};

// The last word on each key.
struct Changes {
    std::vector<uint64_t> gone;
    std::vector<uint64_t> dram;
};

class EventQueue {
  public:
    bool empty() const { return waiting_.keys.empty(); }
    void add(uint64_t key, Tier tier);
    Events take();  // all that waits, oldest first

  private:
    // Events that may wait before those that cancel out are dropped; at 2,500 changes/s that is 26 s of a stuck reader.
    static constexpr size_t kCompactAt = 65536;
    void compact();

    Events waiting_;
    size_t compact_at_ = kCompactAt;
};

// Without the store's mutex: this may take a while.
Changes last_words(const Events& events);

}  // namespace p2pkv::store
