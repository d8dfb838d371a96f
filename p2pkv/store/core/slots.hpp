// Which bytes of the arena are whose: extents, slots, generations. Pure arithmetic on offsets; touches no memory.
//
// The arena is cut into units. An extent is a run of adjacent units that serves slots of one size; all layouts with that
// slot size share it. An extent whose last slot is freed goes back to the pool at once, from where any other size may
// take it. (The slab allocator of Bonwick 1994; pages that move between classes as in memcached.)
//
// 1. Two taken slots never overlap; a slot lies within one extent, an extent within the arena.
// 2. Slots come back warm: within an extent the slot freed last is taken first, and slots never used come last.
// 3. One counter numbers every take, so a slot's generation grows at each reuse, whatever its extent served between.
//
// 16 bytes per slot that was ever used since its extent was assigned, 4 more while it is free.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "block.hpp"

namespace p2pkv::store {

constexpr uint64_t kPageBytes = 4096;  // slots begin and end on pages: sendfile, O_DIRECT and RDMA all want that

struct SlotSize;

// Slots of one size in a run of units. A null occupant: that slot is free; beyond their end: never used yet.
struct Extent {
    SlotSize* size;
    uint32_t unit;
    uint32_t units;
    uint64_t base;
    uint32_t slots;
    std::vector<uint32_t> free;
    std::vector<BlockRef> occupants;
    bool partial = false;  // has a free slot, so it is in its size's list
    Extent* before = nullptr;
    Extent* after = nullptr;

    bool full() const { return free.empty() && occupants.size() == slots; }
};

// One slot size: how long its extents should be, and those that have a free slot.
struct SlotSize {
    uint64_t slot_bytes;
    uint32_t units;
    uint32_t units_min;
    Extent* last = nullptr;  // of those with a free slot: the one to take from
};

class Slots {
  public:
    // Throws std::invalid_argument unless extent_bytes is a positive multiple of 4096 and fits the capacity.
    Slots(uint64_t capacity_bytes, uint64_t extent_bytes);

    // Prepare for slots of this size (again: the same). Null: one such slot is larger than the arena. Takes no memory.
    // Throws std::invalid_argument: not a positive multiple of 4096.
    SlotSize* open(uint64_t slot_bytes);

    // Give the block a slot that was free: sets its offset and generation. False: there is none.
    bool take(SlotSize& size, const BlockRef& block);

    // Give a taken slot back. Drops the slot's reference to the block. Throws std::logic_error on a double free.
    void free(uint64_t offset);

    // The reference to this block; null if it has no slot here.
    BlockRef occupant(const Block& block) const;

    // Show the occupants of units [first, end), and of the extents that reach into them, until `visit` says false.
    template <class Visit>
    bool each(uint32_t first, uint32_t end, Visit&& visit) const {
        for (uint32_t unit = first; unit < end;) {
            const Extent* extent = by_unit_[unit];
            if (extent == nullptr) {
                ++unit;
                continue;
            }
            for (const BlockRef& block : extent->occupants)
                if (block != nullptr && !visit(*block)) return false;
            unit = extent->unit + extent->units;
        }
        return true;
    }

    uint64_t extent_bytes() const { return extent_bytes_; }
    uint32_t units() const { return units_; }
    uint64_t pool_bytes() const { return pool_units_ * extent_bytes_; }
    uint64_t free_slot_bytes() const { return free_slot_bytes_; }

    // (offset, length) of memory that was assigned to a slot size since the last call: it is about to be written.
    std::vector<std::pair<uint64_t, uint64_t>> take_assigned() { return std::exchange(assigned_, {}); }
    bool assigned() const { return !assigned_.empty(); }

    // What is wrong with the books; empty when nothing is. For tests.
    std::string problem() const;

  private:
    Extent* assign(SlotSize& size);
    void unassign(Extent& extent);
    static void append(Extent& extent);
    static void remove(Extent& extent);
    int64_t find_run(uint32_t units) const;

    const uint64_t extent_bytes_;
    const uint32_t units_;
    uint64_t generation_ = 0;
    uint64_t free_slot_bytes_ = 0;
    uint64_t pool_units_;
    std::vector<Extent*> by_unit_;                  // null: in the pool
    std::vector<std::unique_ptr<Extent>> extents_;  // at the extent's first unit
    std::vector<std::unique_ptr<SlotSize>> sizes_;
    std::vector<std::pair<uint64_t, uint64_t>> assigned_;
};

}  // namespace p2pkv::store
