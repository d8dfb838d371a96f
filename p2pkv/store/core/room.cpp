// Making room: what has to go for a new block. The store's mutex is held throughout.
#include <algorithm>
#include <unordered_set>

#include "store.hpp"

namespace p2pkv::store {

namespace {

// A layout gives an extent up only if its coldest block has been idle this many times as long as the taker's. 1 would
// make two equally busy layouts trade extents for ever, each trade evicting hot blocks beside the cold one.
constexpr double kReclaimAgeRatio = 2.0;

// Coldest blocks of a layout whose extents are looked at for one without held slots; bounds the time of one reserve.
constexpr size_t kReclaimVictimsTried = 32;

// Blocks that engines have read by themselves since they were last looked at, and that one reserve moves to the hot end: of
// its own layout, and of the others.
constexpr size_t kSecondChances = 64;

double used_at(const Block& block) { return block.used_at.load(std::memory_order_relaxed); }

}  // namespace

// Let something go so that a slot of this size may be free; false if nothing can go.
bool Store::make_room(SizeClass& size, double now) {
    if (expire_locked(now) != 0) return true;  // a deleted block's slot may have come free; else we are called again
    // Bounded: an engine that marks everything all the time gets no more than this many blocks looked at.
    size_t chances = kSecondChances;
    Block* own = size.lru.victim(
        [&](Block& block) { return held(block) || (chances != 0 && used_unasked(block, now) && chances-- != 0); });
    if (own == nullptr && chances != kSecondChances) own = size.lru.victim([this](Block& block) { return held(block); });
    if (sizes_.size() > 1 && reclaim_extent(size, own, now)) return true;
    if (own == nullptr) return false;
    evict(*own);
    return true;
}

void Store::evict(Block& block) {
    ++counters_.evictions;
    unlist(block);
}

// Empty an extent of the slot size whose coldest block is the coldest, if it is cold enough to give one up.
bool Store::reclaim_extent(SizeClass& size, const Block* own, double now) {
    SizeClass* donor = nullptr;
    double coldest = 0;
    size_t chances = kSecondChances;
    const auto marked = [&](Block& block) { return chances != 0 && used_unasked(block, now) && chances-- != 0; };
    for (const auto& other : sizes_) {
        if (other.get() == &size) continue;
        const size_t before = chances;
        Block* victim = other->lru.victim([&](Block& block) { return held(block) || marked(block); });
        if (victim == nullptr && chances != before)
            victim = other->lru.victim([this](const Block& block) { return held(block); });
        // Too much is marked to be looked at: what is still marked was used now, too.
        if (victim != nullptr && chances == 0 && used_unasked(*victim, now)) other->lru.access(*victim);
        if (victim == nullptr || (donor != nullptr && used_at(*victim) >= coldest)) continue;
        coldest = used_at(*victim);
        donor = other.get();
    }
    if (donor == nullptr) return false;
    if (own != nullptr && now - coldest <= kReclaimAgeRatio * (now - used_at(*own))) return false;
    donor->lru.search(kReclaimVictimsTried, marked, [](const Block&) { return false; });
    const auto window = empty_window(*donor, size);
    for (Block* block : window) evict(*block);
    counters_.extents_reclaimed += !window.empty();
    return !window.empty();
}

// The blocks to evict so that units around one of the donor's coldest blocks come free; none: there are none.
std::vector<Block*> Store::empty_window(SizeClass& donor, const SizeClass& size) {
    std::vector<Block*> window;
    std::unordered_set<uint64_t> tried;
    const uint64_t units = size.slots.units_min;
    const auto can_go = [&](Block& block) {
        if (block.state.load(std::memory_order_relaxed) != State::live || held(block)) return false;
        window.push_back(&block);
        return true;
    };
    const auto look_around = [&](const Block& victim) {
        const uint64_t at = victim.offset / slots_.extent_bytes();
        if (!tried.insert(at).second) return false;
        const uint64_t first = at + 1 > units ? at + 1 - units : 0;
        for (uint64_t unit = first; unit <= std::min(at, slots_.units() - units); ++unit) {
            window.clear();
            if (slots_.each(static_cast<uint32_t>(unit), static_cast<uint32_t>(unit + units), can_go)) return true;
        }
        window.clear();
        return false;
    };
    donor.lru.search(kReclaimVictimsTried, [this](const Block& block) { return held(block); }, look_around);
    return window;
}

}  // namespace p2pkv::store
