#include "slots.hpp"

#include <algorithm>
#include <stdexcept>

namespace p2pkv::store {

namespace {

// How many extent lengths above the shortest possible one are compared for a slot size that packs badly into units.
constexpr uint32_t kUnitsTried = 16;

// If nobody asks what was assigned for this long, nobody wants to know.
constexpr size_t kAssignedMax = 65536;

uint32_t count_units(uint64_t capacity_bytes, uint64_t extent_bytes) {
    if (extent_bytes < kPageBytes || extent_bytes % kPageBytes != 0)
        throw std::invalid_argument("extent_bytes must be a positive multiple of 4096");
    if (capacity_bytes < extent_bytes) throw std::invalid_argument("the arena is smaller than one extent");
    if (capacity_bytes / extent_bytes > UINT32_MAX) throw std::invalid_argument("the arena has too many extents");
    return static_cast<uint32_t>(capacity_bytes / extent_bytes);
}

}  // namespace

Slots::Slots(uint64_t capacity_bytes, uint64_t extent_bytes)
    : extent_bytes_(extent_bytes),
      units_(count_units(capacity_bytes, extent_bytes)),
      pool_units_(units_),
      by_unit_(units_),
      extents_(units_) {}

SlotSize* Slots::open(uint64_t slot_bytes) {
    for (const auto& size : sizes_)
        if (size->slot_bytes == slot_bytes) return size.get();
    if (slot_bytes < kPageBytes || slot_bytes % kPageBytes != 0)
        throw std::invalid_argument("slot_bytes must be a positive multiple of 4096");
    const uint64_t units_min = (slot_bytes + extent_bytes_ - 1) / extent_bytes_;
    if (units_min > units_) return nullptr;
    // A 40 MiB slot wastes 24 MiB of a 64 MiB unit but only 8 MiB of two: take the shortest extent that comes within
    // 1/16 of the most slots that an empty arena can hold.
    const auto slots = [&](uint64_t units) { return units_ / units * (units * extent_bytes_ / slot_bytes); };
    const uint64_t end = std::min<uint64_t>(units_min + kUnitsTried, uint64_t{units_} + 1);
    uint64_t most = 0;
    for (uint64_t units = units_min; units < end; ++units) most = std::max(most, slots(units));
    uint64_t units = units_min;
    while (16 * slots(units) < 15 * most) ++units;
    sizes_.push_back(std::make_unique<SlotSize>(
        SlotSize{slot_bytes, static_cast<uint32_t>(units), static_cast<uint32_t>(units_min)}));
    return sizes_.back().get();
}

bool Slots::take(SlotSize& size, const BlockRef& block) {
    Extent* extent = size.last != nullptr ? size.last : assign(size);
    if (extent == nullptr) return false;
    uint64_t index;
    if (!extent->free.empty()) {
        index = extent->free.back();
        extent->free.pop_back();
        extent->occupants[index] = block;
    } else {
        index = extent->occupants.size();
        extent->occupants.push_back(block);
    }
    if (extent->full()) remove(*extent);
    free_slot_bytes_ -= size.slot_bytes;
    block->generation = ++generation_;
    block->offset = extent->base + index * size.slot_bytes;
    return true;
}

void Slots::free(uint64_t offset) {
    const uint64_t unit = offset / extent_bytes_;
    Extent* extent = unit < units_ ? by_unit_[unit] : nullptr;
    if (extent == nullptr) throw std::logic_error("freed a slot of an extent that is not in use");
    const uint64_t slot_bytes = extent->size->slot_bytes;
    const uint64_t index = (offset - extent->base) / slot_bytes;
    if ((offset - extent->base) % slot_bytes != 0 || index >= extent->occupants.size() || !extent->occupants[index])
        throw std::logic_error("freed a slot that is not taken");
    extent->occupants[index].reset();
    extent->free.push_back(static_cast<uint32_t>(index));
    free_slot_bytes_ += slot_bytes;
    if (extent->free.size() == extent->occupants.size()) {
        unassign(*extent);
    } else if (!extent->partial) {
        append(*extent);  // goes last, so that this warm slot is the next to be taken
    }
}

BlockRef Slots::occupant(const Block& block) const {
    const uint64_t unit = block.offset / extent_bytes_;
    const Extent* extent = unit < units_ ? by_unit_[unit] : nullptr;
    if (extent == nullptr) return nullptr;
    const uint64_t index = (block.offset - extent->base) / extent->size->slot_bytes;
    if (index >= extent->occupants.size() || extent->occupants[index].get() != &block) return nullptr;
    return extent->occupants[index];
}

// Single units from the low end, runs from the high end: small sizes leave the place of large ones whole.
int64_t Slots::find_run(uint32_t units) const {
    if (units == 1) {
        const auto at = std::find(by_unit_.begin(), by_unit_.end(), nullptr);
        return at == by_unit_.end() ? -1 : at - by_unit_.begin();
    }
    uint32_t run = 0;
    for (int64_t unit = int64_t{units_} - 1; unit >= 0; --unit) {
        run = by_unit_[static_cast<size_t>(unit)] == nullptr ? run + 1 : 0;
        if (run == units) return unit;
    }
    return -1;
}

// Move a run of units from the pool to this size; a shorter one than it wants if the pool is in pieces.
Extent* Slots::assign(SlotSize& size) {
    if (pool_units_ < size.units_min) return nullptr;  // what a full arena answers to every first try
    for (uint32_t units = size.units; units >= size.units_min; --units) {
        const int64_t at = find_run(units);
        if (at < 0) continue;
        const auto unit = static_cast<uint32_t>(at);
        auto extent = std::make_unique<Extent>();
        extent->size = &size;
        extent->unit = unit;
        extent->units = units;
        extent->base = unit * extent_bytes_;
        extent->slots = static_cast<uint32_t>(units * extent_bytes_ / size.slot_bytes);
        extent->occupants.reserve(extent->slots);
        pool_units_ -= units;
        if (assigned_.size() < kAssignedMax) assigned_.emplace_back(extent->base, units * extent_bytes_);
        std::fill_n(by_unit_.begin() + unit, units, extent.get());
        free_slot_bytes_ += extent->slots * size.slot_bytes;
        append(*extent);
        return (extents_[unit] = std::move(extent)).get();
    }
    return nullptr;
}

void Slots::unassign(Extent& extent) {
    if (extent.partial) remove(extent);
    pool_units_ += extent.units;
    std::fill_n(by_unit_.begin() + extent.unit, extent.units, nullptr);
    free_slot_bytes_ -= extent.slots * extent.size->slot_bytes;
    extents_[extent.unit].reset();
}

void Slots::append(Extent& extent) {
    extent.partial = true;
    extent.before = extent.size->last;
    extent.after = nullptr;
    if (extent.before != nullptr) extent.before->after = &extent;
    extent.size->last = &extent;
}

void Slots::remove(Extent& extent) {
    extent.partial = false;
    if (extent.before != nullptr) extent.before->after = extent.after;
    (extent.after != nullptr ? extent.after->before : extent.size->last) = extent.before;
    extent.before = extent.after = nullptr;
}

std::string Slots::problem() const {
    uint64_t pool = 0, free_slot_bytes = 0;
    size_t partial = 0, found = 0;
    for (uint32_t unit = 0; unit < units_;) {
        const Extent* extent = by_unit_[unit];
        if (extent == nullptr) {
            ++pool;
            if (extents_[unit] != nullptr) return "an extent in the pool";
            ++unit;
            continue;
        }
        if (extent->unit != unit || extents_[unit].get() != extent) return "extents overlap";
        for (uint32_t i = 0; i < extent->units; ++i)
            if (by_unit_[unit + i] != extent) return "extents overlap";
        const uint64_t slot_bytes = extent->size->slot_bytes;
        if (extent->slots * slot_bytes > extent->units * extent_bytes_) return "slots exceed their extent";
        if (extent->occupants.size() > extent->slots) return "an extent has more slots than fit";
        size_t vacant = 0;
        for (const BlockRef& block : extent->occupants) vacant += block == nullptr;
        auto free = extent->free;
        std::sort(free.begin(), free.end());
        if (std::adjacent_find(free.begin(), free.end()) != free.end()) return "a slot is free twice";
        for (const uint32_t index : free)
            if (index >= extent->occupants.size() || extent->occupants[index] != nullptr) return "a free slot is taken";
        if (free.size() != vacant) return "a free list is not the extent's free slots";
        if (vacant == extent->occupants.size()) return "an extent is empty but not in the pool";
        for (size_t i = 0; i < extent->occupants.size(); ++i)
            if (extent->occupants[i] && extent->occupants[i]->offset != extent->base + i * slot_bytes)
                return "a block lies in another slot than it says";
        free_slot_bytes += (extent->slots - extent->occupants.size() + vacant) * slot_bytes;
        if (extent->partial == extent->full()) return "a free slot cannot be found";
        partial += extent->partial;
        unit += extent->units;
    }
    for (const auto& size : sizes_)
        for (const Extent* extent = size->last; extent != nullptr; extent = extent->before) {
            if (!extent->partial || extent->size != size.get()) return "a full extent among those with free slots";
            ++found;
        }
    if (found != partial) return "a free slot cannot be found";
    if (pool != pool_units_) return "the pool does not add up";
    if (free_slot_bytes != free_slot_bytes_) return "free slots do not add up";
    return {};
}

}  // namespace p2pkv::store
