// Figures, and whether the books agree with each other: what tests ask after every sequence of operations.
#include <unordered_map>
#include <unordered_set>

#include "store.hpp"

namespace p2pkv::store {

namespace {

State state_of(const Block& block) { return block.state.load(std::memory_order_relaxed); }

uint32_t pins_of(const Block& block) { return block.pins.load(std::memory_order_relaxed); }

}  // namespace

Stats Store::stats() const {
    const std::lock_guard lock(mutex_);
    Stats out{};
    out.capacity_bytes = options_.capacity_bytes;
    out.free_bytes = slots_.pool_bytes() + slots_.free_slot_bytes();
    out.live_bytes = live_bytes_;
    out.pinned_bytes = pinned_bytes_;
    out.quarantined_bytes = quarantine_bytes_;
    out.namespaces = spaces_.size();
    for (const auto& [id, space] : spaces_) out.blocks_live += space->listed.size();
    out.blocks_writing = writing_;
    out.blocks_unlisted = unlisted_;
    for (const auto& [token, blocks] : parked_) out.blocks_quarantined += blocks.size();
    out.leases = leases_.size();
    out.commits = counters_.commits;
    out.aborts = counters_.aborts;
    out.evictions = counters_.evictions;
    out.extents_reclaimed = counters_.extents_reclaimed;
    out.quarantines = counters_.quarantines;
    out.leases_expired = counters_.leases_expired;
    out.no_space = counters_.no_space;
    return out;
}

void Store::ignore_leases_for_tests(bool ignore) {
    const std::lock_guard lock(mutex_);
    ignore_leases_ = ignore;
}

std::string Store::problem() const {
    const std::lock_guard lock(mutex_);
    for (auto found : {slots_.problem(), leases_.problem(), problem_of_blocks(), problem_of_sums()})
        if (!found.empty()) return found;
    return {};
}

// Every taken slot has one block, in a state that its surroundings confirm, with the pins of its leases.
std::string Store::problem_of_blocks() const {
    std::unordered_map<const Block*, uint32_t> pins;
    leases_.each([&](const Lease& lease) {
        for (const BlockRef& block : lease.blocks) ++pins[block.get()];
    });
    std::unordered_set<const Block*> parked;
    for (const auto& [token, blocks] : parked_) parked.insert(blocks.begin(), blocks.end());
    std::string problem;
    slots_.each(0, slots_.units(), [&](const Block& block) {
        const auto leased = pins.find(&block);
        const Space* home = block.home;
        if (pins_of(block) != (leased == pins.end() ? 0 : leased->second)) problem = "pins are not those of the leases";
        if (leased != pins.end()) pins.erase(leased);
        const bool listed = home != nullptr && home == find(block.space_id) && home->blocks.find(block.key()) == &block;
        switch (state_of(block)) {
            case State::live:
                if (!listed) problem = "live, but not listed";
                if (!block.proven) problem = "live without a checksum";
                break;
            case State::writing:
                if (pins_of(block) != 0) problem = "pinned before it was written";
                if (home != nullptr && !listed) problem = "being written, but that is not known";
                break;
            case State::unlisted:
                if (pins_of(block) == 0) problem = "unlisted, but nobody holds it";
                break;
            case State::parked:
                if (parked.count(&block) == 0) problem = "parked under no token";
                break;
            case State::free:
                problem = "free, but it has a slot";
        }
        return problem.empty();
    });
    if (problem.empty() && !pins.empty()) problem = "a leased block has lost its slot";
    return problem;
}

// Nothing is listed that has no slot, and the running sums are the sums.
std::string Store::problem_of_sums() const {
    size_t blocks[5] = {};
    uint64_t bytes[5] = {};
    uint64_t pinned = 0;
    slots_.each(0, slots_.units(), [&](const Block& block) {
        ++blocks[static_cast<size_t>(state_of(block))];
        bytes[static_cast<size_t>(state_of(block))] += block.length;
        if (pins_of(block) != 0) pinned += block.length;
        return true;
    });
    const auto count = [&](State state) { return blocks[static_cast<size_t>(state)]; };
    const auto sum = [&](State state) { return bytes[static_cast<size_t>(state)]; };

    std::unordered_map<const SizeClass*, size_t> live, namespaces;
    size_t listed = 0, known = 0, parked = 0;
    for (const auto& [id, space] : spaces_) {
        listed += space->listed.size();
        known += space->blocks.size();
        live[&space->size] += space->listed.size();
        ++namespaces[&space->size];
        size_t chained = 0, in_table = 0;
        for (const Block* block = space->listed.front(); block != nullptr; block = space->listed.after(*block)) {
            if (state_of(*block) != State::live || block->home != space.get()) return "listed, but not live";
            ++chained;
        }
        space->blocks.each([&](const Block&) { ++in_table; });
        if (chained != space->listed.size() || in_table != space->blocks.size()) return "a namespace has lost count";
    }
    for (const auto& [token, of] : parked_) parked += of.size();
    if (listed != count(State::live)) return "a listed block has lost its slot";
    if (known - listed > count(State::writing)) return "a reservation has lost its slot";
    if (parked != count(State::parked)) return "a quarantined block has lost its slot";
    if (writing_ != count(State::writing)) return "reservations do not add up";
    if (unlisted_ != count(State::unlisted)) return "unlisted blocks do not add up";
    if (live_bytes_ != sum(State::live)) return "live bytes do not add up";
    if (quarantine_bytes_ != sum(State::parked)) return "quarantined bytes do not add up";
    if (pinned_bytes_ != pinned) return "pinned bytes do not add up";
    if (namespaces.size() != sizes_.size()) return "slot sizes are not the layouts'";
    for (const auto& size : sizes_) {
        if (namespaces[size.get()] != size->namespaces) return "slot sizes are not the layouts'";
        if (size->lru.enabled() && size->lru.size() != live[size.get()]) return "the LRU has lost blocks";
    }
    return {};
}

}  // namespace p2pkv::store
