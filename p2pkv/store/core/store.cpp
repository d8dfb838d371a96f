#include "store.hpp"

#include <algorithm>
#include <stdexcept>
#include <unordered_set>

namespace p2pkv::store {

namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;

uint64_t index_key(const Space& space, std::string_view key) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    uint64_t hash;
    std::memcpy(&hash, key.data(), sizeof hash);
    return hash ^ space.salt;
}

// For `at_place`, later.
std::string place_of(const Block& block) {
    std::string place(reinterpret_cast<const char*>(&block.space_id), sizeof block.space_id);
    return place.append(block.key());
}

}  // namespace

Store::Store(const Options& options)
    : options_(options),
      seed_(options.lease_seed ? mix64(*options.lease_seed) : random64()),
      ids_(options.lease_seed),
      slots_(options.capacity_bytes, options.extent_bytes),
      leases_(options.leases) {}

Store::~Store() = default;

// ---- namespaces

void Store::publish(int table_fd, int marks_fd, uint64_t entries) {
    auto directory = std::make_unique<Directory>(table_fd, marks_fd, options_.capacity_bytes, entries,
                                                 options_.lease_seed ? mix64(*options_.lease_seed + 1) : random64());
    const std::lock_guard lock(mutex_);
    directory_ = std::move(directory);
}

bool Store::open(uint64_t space, uint64_t block_bytes, uint64_t salt, uint64_t slot_bytes) {
    if (block_bytes == 0 || block_bytes > UINT32_MAX || block_bytes > slot_bytes)
        throw std::invalid_argument("a block is between 1 byte and its slot long");
    const std::lock_guard lock(mutex_);
    if (spaces_.count(space) != 0) return true;
    SlotSize* slots = slots_.open(slot_bytes);
    if (slots == nullptr) return false;
    auto size = std::find_if(sizes_.begin(), sizes_.end(), [&](const auto& each) { return &each->slots == slots; });
    if (size == sizes_.end()) size = sizes_.insert(size, std::make_unique<SizeClass>(*slots, options_.evict));
    ++(*size)->namespaces;
    spaces_[space] = std::make_unique<Space>(space, salt, static_cast<uint32_t>(block_bytes), **size, seed_);
    return true;
}

size_t Store::drop(uint64_t id) {
    const std::lock_guard lock(mutex_);
    const auto found = spaces_.find(id);
    if (found == spaces_.end()) return 0;
    Space& space = *found->second;
    const size_t count = space.listed.size();
    while (Block* block = space.listed.front()) unlist(*block);
    space.blocks.each([](Block& block) { block.home = nullptr; });  // what is left is being written
    SizeClass& size = space.size;
    spaces_.erase(found);
    if (--size.namespaces == 0) std::erase_if(sizes_, [&](const auto& each) { return each.get() == &size; });
    return count;
}

uint64_t Store::block_bytes(uint64_t id) const {
    const std::lock_guard lock(mutex_);
    const Space* space = find(id);
    return space == nullptr ? 0 : space->block_bytes;
}

Space* Store::find(uint64_t id) const {
    const auto found = spaces_.find(id);
    return found == spaces_.end() ? nullptr : found->second.get();
}

Block* Store::find_live(const Space& space, std::string_view key) const {
    Block* block = space.blocks.find(key);
    return block != nullptr && block->state.load(kRelaxed) == State::live ? block : nullptr;
}

// ---- writing

Reserved Store::reserve(uint64_t id, std::string_view key, double now, BlockRef* out) {
    const std::lock_guard lock(mutex_);
    Space* space = find(id);
    if (space == nullptr || key.size() < kKeyBytesMin || key.size() > kKeyBytesMax) return Reserved::invalid;
    if (Block* present = space->blocks.find(key)) {
        if (present->state.load(kRelaxed) != State::live) return Reserved::busy;
        use(*present, now);
        return Reserved::exists;
    }
    SizeClass& size = space->size;
    auto block = std::make_shared<Block>(id, space, key, space->block_bytes, now);
    while (!slots_.take(size.slots, block)) {
        if (!make_room(size, now)) {
            ++counters_.no_space;
            return Reserved::no_space;
        }
    }
    if (slots_.assigned()) extents_waiting_.store(true, kRelaxed);
    space->blocks.insert(*block);
    ++writing_;
    *out = std::move(block);
    return Reserved::ok;
}

bool Store::commit(const BlockRef& block, const Digest& checksum, double now) {
    return commit(*block, checksum, now) == Ended::done;
}

Ended Store::commit(Block& block, const Digest& checksum, double now) {
    const std::lock_guard lock(mutex_);
    const Ended ended = end_writing(block);
    if (ended == Ended::dropped) free_slot(block);
    if (ended != Ended::done) return ended;
    Space& space = *block.home;
    block.checksum = checksum;
    block.proven.store(true, std::memory_order_release);
    block.used_at.store(now, kRelaxed);
    block.state.store(State::live, kRelaxed);
    space.listed.push_back(block);
    space.size.lru.insert(block);
    if (directory_ != nullptr) block.entry = directory_->add(space.id, block.key(), block.offset, block.length, block.checksum);
    live_bytes_ += block.length;
    ++counters_.commits;
    events_.add(index_key(space, block.key()), Tier::dram);
    return Ended::done;
}

void Store::abort(const BlockRef& block) { abort(*block); }

Ended Store::abort(Block& block) {
    const std::lock_guard lock(mutex_);
    const Ended ended = end_writing(block);
    if (ended == Ended::over) return ended;
    if (ended == Ended::done) block.home->blocks.erase(block);
    ++counters_.aborts;
    free_slot(block);
    return ended;
}

Ended Store::park(Block& block, uint64_t token) {
    const std::lock_guard lock(mutex_);
    const Ended ended = end_writing(block);
    if (ended == Ended::over) return ended;
    if (ended == Ended::done) block.home->blocks.erase(block);
    block.home = nullptr;
    block.state.store(State::parked, kRelaxed);
    parked_[token].push_back(&block);
    quarantine_bytes_ += block.length;
    ++counters_.quarantines;
    return ended;
}

size_t Store::clear(uint64_t token) {
    const std::lock_guard lock(mutex_);
    const auto parked = parked_.extract(token);
    if (parked.empty()) return 0;
    for (Block* block : parked.mapped()) {
        quarantine_bytes_ -= block->length;
        free_slot(*block);
    }
    return parked.mapped().size();
}

bool Store::quarantine_full() const {
    const std::lock_guard lock(mutex_);
    return quarantine_bytes_ > options_.quarantine_bytes_max;
}

// Count a reservation as over. It is still in its namespace's table, unless that was dropped.
Ended Store::end_writing(Block& block) {
    if (block.state.load(kRelaxed) != State::writing || slots_.occupant(block) == nullptr) return Ended::over;
    --writing_;
    return block.home == nullptr ? Ended::dropped : Ended::done;
}

// ---- reading

Pinned Store::pin(uint64_t id, const std::vector<std::string_view>& keys, double ttl_s, double now, uint64_t holder) {
    const PinnedBlocks got = pin_blocks(id, keys, ttl_s, now, holder);
    Pinned out{got.lease, got.ttl_s, got.expires_at, got.considered, std::vector<Place>(keys.size())};
    // Outside the mutex: what a pinned block is does not change.
    for (size_t i = 0; i < keys.size(); ++i)
        if (const Block* block = got.blocks[i].get())
            out.places[i] = {true, block->offset, block->length, block->generation, block->checksum};
    return out;
}

PinnedBlocks Store::pin_blocks(uint64_t id, const std::vector<std::string_view>& keys, double ttl_s, double now,
                               uint64_t holder) {
    PinnedBlocks out{0, 0, now, keys.size(), Blocks(keys.size())};
    LeaseIds::Batch batch;
    const bool drawn = ids_.low();
    if (drawn) LeaseIds::draw(&batch);
    std::unique_lock lock(mutex_);
    if (drawn) ids_.refill(batch);
    while (ids_.empty()) {  // a hundred others were faster
        lock.unlock();
        LeaseIds::draw(&batch);
        lock.lock();
        ids_.refill(batch);
    }

    const Space* space = find(id);
    if (space == nullptr) return out;
    uint64_t hits = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
        if (const Block* block = find_live(*space, keys[i])) {
            out.blocks[i] = slots_.occupant(*block);
            ++hits;
        }
    }
    if (hits * space->block_bytes > leases_.room(holder) ||
        hits * space->block_bytes + pinned_bytes_ > options_.pinned_bytes_max) {
        expire_locked(now);
        out.considered = affordable(out.blocks, space->block_bytes, holder);
        for (size_t i = out.considered; i < keys.size(); ++i) {
            hits -= out.blocks[i] != nullptr;
            out.blocks[i].reset();
        }
    }
    if (hits == 0) return out;

    Blocks held;
    held.reserve(hits);
    for (const BlockRef& block : out.blocks)
        if (block != nullptr) held.push_back(block);
    for (auto block = held.rbegin(); block != held.rend(); ++block) {
        if ((*block)->pins.fetch_add(1, kRelaxed) == 0) pinned_bytes_ += (*block)->length;
        use(**block, now);
    }
    uint64_t lease_id = ids_.next();
    while (lease_id == 0 || leases_.has(lease_id)) lease_id = ids_.next();
    const Lease& lease = leases_.grant(lease_id, holder, std::move(held), hits * space->block_bytes, ttl_s, now);
    out.lease = lease_id;
    out.ttl_s = lease.expires_at - now;
    out.expires_at = lease.expires_at;
    return out;
}

bool Store::release(uint64_t id, double now, uint64_t holder) {
    const std::lock_guard lock(mutex_);
    const Lease* lease = leases_.find(id);
    return lease != nullptr && lease->holder == holder && release_locked(lease, now);
}

bool Store::release_any(uint64_t id, double now) {
    const std::lock_guard lock(mutex_);
    const Lease* lease = leases_.find(id);
    return lease != nullptr && release_locked(lease, now);
}

size_t Store::release_holder(uint64_t holder) {
    const std::lock_guard lock(mutex_);
    size_t count = 0;
    for (; const Lease* lease = leases_.first_of(holder); ++count) end_lease(*lease);
    return count;
}

size_t Store::expire(double now) {
    const std::lock_guard lock(mutex_);
    return expire_locked(now);
}

BlockRef Store::lookup(uint64_t id, std::string_view key) const {
    const std::lock_guard lock(mutex_);
    const Space* space = find(id);
    const Block* block = space == nullptr ? nullptr : find_live(*space, key);
    return block == nullptr ? nullptr : slots_.occupant(*block);
}

Blocks Store::lookup_many(uint64_t id, const std::vector<std::string_view>& keys) const {
    Blocks out(keys.size());
    const std::lock_guard lock(mutex_);
    if (const Space* space = find(id))
        for (size_t i = 0; i < keys.size(); ++i)
            if (const Block* block = find_live(*space, keys[i])) out[i] = slots_.occupant(*block);
    return out;
}

std::vector<uint8_t> Store::present(uint64_t id, const std::vector<std::string_view>& keys) const {
    std::vector<uint8_t> out(keys.size());
    const std::lock_guard lock(mutex_);
    if (const Space* space = find(id))
        for (size_t i = 0; i < keys.size(); ++i) out[i] = find_live(*space, keys[i]) != nullptr;
    return out;
}

bool Store::writing(uint64_t id, std::string_view key) const {
    const std::lock_guard lock(mutex_);
    const Space* space = find(id);
    const Block* block = space == nullptr ? nullptr : space->blocks.find(key);
    return block != nullptr && block->state.load(kRelaxed) == State::writing;
}

size_t Store::touch(uint64_t id, const std::vector<std::string_view>& keys, double now) {
    const std::lock_guard lock(mutex_);
    const Space* space = find(id);
    size_t count = 0;
    if (space == nullptr) return count;
    for (auto key = keys.rbegin(); key != keys.rend(); ++key) {
        if (Block* block = find_live(*space, *key)) {
            use(*block, now);
            ++count;
        }
    }
    return count;
}

bool Store::erase(uint64_t id, std::string_view key) {
    const std::lock_guard lock(mutex_);
    const Space* space = find(id);
    Block* block = space == nullptr ? nullptr : find_live(*space, key);
    if (block == nullptr) return false;
    unlist(*block);
    return true;
}

size_t Store::count(uint64_t id) const {
    const std::lock_guard lock(mutex_);
    const Space* space = find(id);
    return space == nullptr ? 0 : space->listed.size();
}

std::vector<std::string> Store::keys(uint64_t id, size_t limit) const {
    std::vector<std::string> out;
    const std::lock_guard lock(mutex_);
    const Space* space = find(id);
    if (space == nullptr) return out;
    for (const Block* block = space->listed.front(); block != nullptr && out.size() < limit;
         block = space->listed.after(*block))
        out.emplace_back(block->key());
    return out;
}

std::vector<std::string> Store::hot(uint64_t id, size_t limit, std::string_view from) const {
    constexpr size_t kLookedAtPerKey = 4;
    std::vector<std::string> out;
    const std::lock_guard lock(mutex_);
    const Space* space = find(id);
    const Block* block = space == nullptr ? nullptr : space->size.lru.hottest();
    if (!from.empty()) {
        const Block* seen = at_place(from);
        if (space == nullptr || seen == nullptr || &seen->home->size != &space->size) return out;
        block = Lru::colder(*seen);
    }
    const Block* last = nullptr;
    for (size_t left = kLookedAtPerKey * limit; block != nullptr && left != 0 && out.size() < limit; --left) {
        if (block->home == space) out.emplace_back(block->key());
        last = block;
        block = Lru::colder(*block);
    }
    if (block == nullptr) {
        out.emplace_back();
    } else {
        out.push_back(last == nullptr ? std::string(from) : place_of(*last));
    }
    return out;
}

const Block* Store::at_place(std::string_view place) const {
    uint64_t id;
    if (place.size() < sizeof id) return nullptr;
    std::memcpy(&id, place.data(), sizeof id);
    const Space* space = find(id);
    return space == nullptr ? nullptr : find_live(*space, place.substr(sizeof id));
}

std::string Store::count_marks(uint64_t id, std::string_view from, size_t most, double now) {
    const std::lock_guard lock(mutex_);
    const Space* space = find(id);
    if (space == nullptr) return {};
    Block* block = from.empty() ? space->listed.back() : find_live(*space, from);
    for (; block != nullptr && most != 0; --most, block = List<&Block::listed>::before(*block))
        if (used_unasked(*block, now)) space->size.lru.access(*block);
    return block == nullptr ? std::string() : std::string(block->key());
}

// ---- the ownership log

Events Store::take_events() {
    const std::lock_guard lock(mutex_);
    return events_.take();
}

std::vector<uint64_t> Store::index_keys() const {
    std::vector<uint64_t> out;
    const std::lock_guard lock(mutex_);
    for (const auto& [id, space] : spaces_)
        for (const Block* block = space->listed.front(); block != nullptr; block = space->listed.after(*block))
            out.push_back(index_key(*space, block->key()));
    return out;
}

std::vector<std::pair<uint64_t, uint64_t>> Store::take_extents() {
    const std::lock_guard lock(mutex_);
    extents_waiting_.store(false, kRelaxed);
    return slots_.take_assigned();
}

// ---- holding and letting go

void Store::end_lease(const Lease& lease) {
    for (const BlockRef& block : leases_.end(lease)) {
        if (block->pins.fetch_sub(1, kRelaxed) != 1) continue;
        pinned_bytes_ -= block->length;
        if (block->state.load(kRelaxed) == State::unlisted) {
            --unlisted_;
            free_slot(*block);
        }
    }
}

bool Store::release_locked(const Lease* lease, double now) {
    const bool in_force = now < lease->expires_at;
    end_lease(*lease);
    return in_force;
}

size_t Store::expire_locked(double now) {
    size_t count = 0;
    for (; const Lease* lease = leases_.expired(now); ++count) end_lease(*lease);
    counters_.leases_expired += count;
    return count;
}

// How many of these entries, from the first on, can be pinned within the budgets.
size_t Store::affordable(const Blocks& blocks, uint64_t block_bytes, uint64_t holder) const {
    uint64_t room = leases_.room(holder);
    const uint64_t unpinned_room = options_.pinned_bytes_max - std::min(options_.pinned_bytes_max, pinned_bytes_);
    std::unordered_set<const Block*> fresh;
    for (size_t i = 0; i < blocks.size(); ++i) {
        const Block* block = blocks[i].get();
        if (block == nullptr) continue;
        if (block->pins.load(kRelaxed) == 0) fresh.insert(block);
        if (room < block_bytes || fresh.size() * block_bytes > unpinned_room) return i;
        room -= block_bytes;
    }
    return blocks.size();
}

void Store::use(Block& block, double now) {
    block.used_at.store(now, kRelaxed);
    block.home->size.lru.access(block);
}

// Whether an engine has read it by itself since this was last asked: then it is as good as used now.
bool Store::used_unasked(Block& block, double now) {
    if (block.entry == Directory::kNowhere || !directory_->take_mark(block.entry)) return false;
    block.used_at.store(now, kRelaxed);
    return true;
}

// Unlist a live block and free its slot, now or when the last lease on it ends.
void Store::unlist(Block& block) {
    Space& space = *block.home;
    if (block.entry != Directory::kNowhere) {
        directory_->remove(block.entry, space.id, block.key());
        block.entry = Directory::kNowhere;
    }
    space.blocks.erase(block);
    space.listed.erase(block);
    space.size.lru.remove(block);
    block.home = nullptr;
    live_bytes_ -= block.length;
    events_.add(index_key(space, block.key()), Tier::gone);
    if (held(block)) {
        block.state.store(State::unlisted, kRelaxed);
        ++unlisted_;
    } else {
        free_slot(block);
    }
}

// The block may be gone afterwards: the slot's reference was perhaps the last.
void Store::free_slot(Block& block) {
    block.home = nullptr;
    block.state.store(State::free, kRelaxed);
    slots_.free(block.offset);
}

}  // namespace p2pkv::store
