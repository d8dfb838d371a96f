// The DRAM tier's books: which block lies in which slot of the arena, who holds it, and what has to go for a new one.
//
// Decides about offsets and never touches the bytes. Thread-safe: one mutex, held for microseconds and never across a
// system call, so that the event loop and the I/O threads can all ask. `now` is the caller's CLOCK_MONOTONIC in seconds.
// The rules are those of p2pkv/store/reference.py, which is this class's oracle in the tests.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace p2pkv::store {

using Digest = std::array<unsigned char, 16>;
constexpr size_t kKeyBytesMin = 8;
constexpr size_t kKeyBytesMax = 64;

enum class State : uint8_t { free = 0, writing = 1, live = 2, unlisted = 3, parked = 4 };  // p2pkv.store.base.BlockState

// One occupancy of one slot, from reservation to reuse. Read `state`, `pins` and `used_at` through the store only.
struct Block;
using BlockRef = std::shared_ptr<Block>;

// As in p2pkv.types.Status, as far as the store gives these answers.
enum class Reserved : uint8_t { ok, exists, busy, no_space, invalid };

// A block that a pin found (`hit`), as it was at that moment; it stays so for as long as the lease is in force.
struct Place {
    bool hit = false;
    uint64_t offset = 0;
    uint64_t length = 0;
    uint64_t generation = 0;
    Digest checksum{};
};

struct Pinned {
    uint64_t lease = 0;    // 0: nothing was pinned
    double ttl_s = 0;
    double expires_at = 0;
    size_t considered = 0;  // keys from here on were not looked at: the holder's or the store's budget is spent
    std::vector<Place> places;  // one per key
};

struct LeaseLimits {
    double ttl_min_s = 0.05;
    double ttl_max_s = 30.0;
    uint64_t leases_max = 65536;
    uint64_t leases_per_holder_max = 4096;
    uint64_t bytes_per_holder_max = uint64_t{1} << 62;
};

class Store {
  public:
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
    static uint64_t offset_of(const Block& block);
    static uint64_t length_of(const Block& block);
    // Bytes of one block of this namespace; 0 when it is not open.
    uint64_t block_bytes(uint64_t space) const;
};

}  // namespace p2pkv::store
