// The DRAM tier's books: which block lies in which slot of the arena, who holds it, and what has to go for a new one.
//
// Decides about offsets and never touches the bytes. Thread-safe: one mutex, held for microseconds and never across a
// system call of ours, so that the event loop and the I/O threads can all ask. `now` is the caller's CLOCK_MONOTONIC in
// seconds. The rules are those of p2pkv/store/reference.py, which is this class's oracle in the tests.
#pragma once
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "block.hpp"
#include "directory.hpp"
#include "events.hpp"
#include "lease_ids.hpp"
#include "leases.hpp"
#include "list.hpp"
#include "lru.hpp"
#include "slots.hpp"
#include "store_types.hpp"
#include "table.hpp"

namespace p2pkv::store {

// What the namespaces with one slot size share: slots, and the order of eviction among them.
struct SizeClass {
    SizeClass(SlotSize& slots, bool evict) : slots(slots), lru(evict) {}
    SlotSize& slots;
    Lru lru;
    uint32_t namespaces = 0;
};

// One namespace: its blocks that are listed, and those that are being written.
struct Space {
    Space(uint64_t id, uint64_t salt, uint32_t block_bytes, SizeClass& size, uint64_t seed)
        : id(id), salt(salt), block_bytes(block_bytes), size(size), blocks(seed) {}
    const uint64_t id;
    const uint64_t salt;  // of its index keys
    const uint32_t block_bytes;
    SizeClass& size;
    Table blocks;                 // live and writing
    List<&Block::listed> listed;  // live, the oldest put first
};

struct Options {
    uint64_t capacity_bytes = 0;
    uint64_t extent_bytes = 0;
    bool evict = true;  // false: a full store answers no_space
    LeaseLimits leases;
    uint64_t pinned_bytes_max = 0;      // under all leases together, each block once
    uint64_t quarantine_bytes_max = 0;  // above it, `quarantine_full` asks for action
    std::optional<uint64_t> lease_seed;  // predictable lease ids, for tests; else from the kernel
};

struct Stats {
    uint64_t capacity_bytes, free_bytes, live_bytes, pinned_bytes, quarantined_bytes;
    uint64_t namespaces, blocks_live, blocks_writing, blocks_unlisted, blocks_quarantined, leases;
    uint64_t commits, aborts, evictions, extents_reclaimed, quarantines, leases_expired, no_space;
};

// How an end of a reservation went. `over`: it had ended already, and nothing was done: a bug in the caller.
enum class Ended : uint8_t { done, dropped, over };

// As Pinned, but with the blocks themselves; null: not here.
struct PinnedBlocks {
    uint64_t lease = 0;
    double ttl_s = 0;
    double expires_at = 0;
    size_t considered = 0;
    Blocks blocks;
};

class Store {
  public:
    // Throws std::invalid_argument: the sizes do not fit each other.
    explicit Store(const Options& options);
    ~Store();
    Store(const Store&) = delete;
    Store& operator=(const Store&) = delete;

    // ---- what the I/O threads use; each locks by itself

    // Hold those of these blocks that are here, in one lease, for ttl_s (clamped). Counts as a use, the last key as the
    // earliest. `holder` names whom the lease belongs to: limits apply per holder.
    Pinned pin(uint64_t space, const std::vector<std::string_view>& keys, double ttl_s, double now, uint64_t holder);
    // True: in force all along. A lease of another holder is left alone, and the answer is false.
    bool release(uint64_t lease, double now, uint64_t holder);
    // A slot for a block that is about to be written; commit, abort or park it, once.
    Reserved reserve(uint64_t space, std::string_view key, double now, BlockRef* out);
    // False: the namespace was dropped meanwhile; the slot is free and nothing was listed.
    bool commit(const BlockRef& block, const Digest& checksum, double now);
    void abort(const BlockRef& block);
    // Where a reservation's bytes go. Never changes during the life of a block.
    static uint64_t offset_of(const Block& block) { return block.offset; }
    static uint64_t length_of(const Block& block) { return block.length; }
    // Bytes of one block of this namespace; 0 when it is not open.
    uint64_t block_bytes(uint64_t space) const;

    // ---- the same with more to say. The block must be alive: the caller has a reference to it.

    PinnedBlocks pin_blocks(uint64_t space, const std::vector<std::string_view>& keys, double ttl_s, double now,
                            uint64_t holder);
    // Whoever's it is. Only for a caller that trusts the one who names it.
    bool release_any(uint64_t lease, double now);
    // End all leases of a holder that is gone; how many there were.
    size_t release_holder(uint64_t holder);
    // End the leases that are over; how many. Otherwise they end when their room is needed, by a pin or a reserve.
    size_t expire(double now);
    Ended commit(Block& block, const Digest& checksum, double now);
    Ended abort(Block& block);

    // Give a reservation up although bytes may still land in its slot; its slot is nobody's until clear(token). Tokens
    // from 1 << 63 on are those of p2pkv.store.dram; threads that park by themselves use smaller ones.
    Ended park(Block& block, uint64_t token);
    size_t clear(uint64_t token);
    bool quarantine_full() const;

    // ---- namespaces

    // From now on tell engines in shared memory what is here; before anything is. Throws std::system_error.
    void publish(int table_fd, int marks_fd, uint64_t entries);
    const Directory* directory() const { return directory_.get(); }

    // False: a block is larger than the arena. Again: nothing changes. Throws std::invalid_argument: the slot is not whole
    // pages, or smaller than the block.
    bool open(uint64_t space, uint64_t block_bytes, uint64_t salt, uint64_t slot_bytes);
    // Forget a namespace and its blocks; how many were dropped. Leases and writers keep their slots until they end.
    size_t drop(uint64_t space);

    // ---- reading

    // No use is counted and nothing is held. Null: not here.
    BlockRef lookup(uint64_t space, std::string_view key) const;
    Blocks lookup_many(uint64_t space, const std::vector<std::string_view>& keys) const;
    // One byte per key: 1 = here.
    std::vector<uint8_t> present(uint64_t space, const std::vector<std::string_view>& keys) const;
    bool writing(uint64_t space, std::string_view key) const;
    // Count a use of these blocks, the last key as the earliest; how many are here.
    size_t touch(uint64_t space, const std::vector<std::string_view>& keys, double now);
    // Unlist a block; leases on it stay in force, and its slot is free once they end. False: it is not here.
    bool erase(uint64_t space, std::string_view key);
    size_t count(uint64_t space) const;
    // Of at most `limit` listed blocks, the oldest put first.
    std::vector<std::string> keys(uint64_t space, size_t limit) const;
    // At most `limit` of them, the one used last first, and behind them the place to go on from (empty: that was all).
    // A prefix comes before what follows it, as that counts as used earlier. Looks at a bounded number of blocks of all
    // namespaces with this slot size, so there may be a place and no block. A place is a namespace's id and a key of
    // it; empty: from the beginning. Nothing at all: the block at that place has gone.
    std::vector<std::string> hot(uint64_t space, size_t limit, std::string_view from) const;
    // Count what engines have read by themselves as used: of `most` listed blocks, from the newest, or from before the
    // block `from`. The key to go on from; empty: that was all.
    std::string count_marks(uint64_t space, std::string_view from, size_t most, double now);

    // ---- the ownership log

    Events take_events();
    // Index keys of all listed blocks, in no order.
    std::vector<uint64_t> index_keys() const;

    // ---- figures and checks

    Stats stats() const;
    // (offset, length) of memory that was assigned to a slot size since the last call: it is about to be written.
    std::vector<std::pair<uint64_t, uint64_t>> take_extents();
    bool extents_waiting() const { return extents_waiting_.load(std::memory_order_relaxed); }
    // What is wrong with the books; empty when nothing is. O(everything). For tests.
    std::string problem() const;
    // From now on a lease does not hold its blocks in their slots: what happens when the guard is out. For tests.
    void ignore_leases_for_tests(bool ignore);

  private:
    struct Counters {
        uint64_t commits, aborts, evictions, extents_reclaimed, quarantines, leases_expired, no_space;
    };

    Space* find(uint64_t space) const;
    Block* find_live(const Space& space, std::string_view key) const;
    const Block* at_place(std::string_view place) const;

    // ---- holding and letting go
    // Whether a lease keeps this block in its slot. The one guard between leases and reuse: all paths ask here.
    bool held(const Block& block) const {
        return block.pins.load(std::memory_order_relaxed) != 0 && !ignore_leases_;
    }
    void end_lease(const Lease& lease);
    bool release_locked(const Lease* lease, double now);
    size_t expire_locked(double now);
    size_t affordable(const Blocks& blocks, uint64_t block_bytes, uint64_t holder) const;
    Ended end_writing(Block& block);
    void use(Block& block, double now);
    bool used_unasked(Block& block, double now);
    void unlist(Block& block);
    void free_slot(Block& block);
    void evict(Block& block);

    // ---- making room (room.cpp)
    bool make_room(SizeClass& size, double now);
    bool reclaim_extent(SizeClass& size, const Block* own, double now);
    std::vector<Block*> empty_window(SizeClass& donor, const SizeClass& size);

    std::string problem_of_blocks() const;
    std::string problem_of_sums() const;

    mutable std::mutex mutex_;
    const Options options_;
    const uint64_t seed_;  // of the tables
    LeaseIds ids_;
    // Everything below under the mutex. The slots come first, so that the blocks outlive what points to them.
    Slots slots_;
    LeaseTable leases_;
    EventQueue events_;
    std::unordered_map<uint64_t, std::unique_ptr<Space>> spaces_;
    std::vector<std::unique_ptr<SizeClass>> sizes_;  // the oldest first
    std::unordered_map<uint64_t, std::vector<Block*>> parked_;
    std::unique_ptr<Directory> directory_;  // null: engines ask for everything
    Counters counters_{};
    uint64_t live_bytes_ = 0;
    uint64_t pinned_bytes_ = 0;
    uint64_t quarantine_bytes_ = 0;
    uint64_t writing_ = 0;
    uint64_t unlisted_ = 0;
    bool ignore_leases_ = false;
    std::atomic<bool> extents_waiting_{false};
};

}  // namespace p2pkv::store
