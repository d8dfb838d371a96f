// The directory's place in shared memory: which blocks are in the arena and where, for engines to read for themselves.
//
// An engine's local hit needs no question then: it finds the block here, copies it out of the arena, and looks again
// whether it was there all along (a sequence lock per entry: Lameter 2005, "Effective synchronization on Linux/NUMA
// systems"; Boehm 2012, "Can seqlocks get along with programming language memory models?"). The owner makes an entry
// invalid before the block's slot can be given to anybody, so bytes that were copied from under a valid entry are the
// block's.
//
// Two files: `Table`, which engines map read-only, and `Marks`, which they may write: that they have used a block, and how
// much they have read. Marks are hints: whatever an engine writes there changes the order of eviction and some counters.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace p2pkv::directory {

constexpr uint64_t kMagic = 0x7032706b'76646972;  // "p2pkvdir"
constexpr uint32_t kVersion = 2;
constexpr size_t kWays = 8;  // names that hash to one bucket; who finds no room in two buckets is not in the directory
constexpr size_t kKeyBytes = 64;
constexpr size_t kPageBytes = 4096;

struct Header {
    uint64_t magic;
    uint32_t version;
    uint32_t entry_bytes;
    uint64_t buckets;  // a power of two
    uint64_t entries;
    uint64_t seed;
    uint64_t arena_bytes;
};

// Nothing, or 32 bits of a name's hash and the number of its entry, plus one: `tag << 32 | number`.
using Way = std::atomic<uint64_t>;

struct alignas(64) Bucket {
    Way ways[kWays];
};

struct Entry {
    std::atomic<uint64_t> version;  // odd: what follows is of no use
    std::atomic<uint64_t> space;
    std::atomic<uint64_t> offset;  // in the arena
    std::atomic<uint32_t> length;
    std::atomic<uint32_t> key_bytes;
    std::atomic<uint64_t> key[kKeyBytes / 8];
    std::atomic<uint64_t> checksum[2];  // of the block's bytes: xxh3_128, as in memory
};
static_assert(sizeof(Entry) == 112 && Way::is_always_lock_free);

// Header, padded to a page; buckets; entries.
constexpr size_t buckets_at() { return kPageBytes; }
inline size_t entries_at(uint64_t buckets) { return buckets_at() + buckets * sizeof(Bucket); }
inline size_t table_bytes(uint64_t buckets, uint64_t entries) { return entries_at(buckets) + entries * sizeof(Entry); }

struct Counts {
    std::atomic<uint64_t> blocks;
    std::atomic<uint64_t> bytes;
};

// Counts, padded to a page; a byte per entry, not 0 once an engine has used it.
constexpr size_t marks_at() { return kPageBytes; }
inline size_t marks_bytes(uint64_t entries) { return marks_at() + entries; }

struct Hash {
    uint64_t first, second;  // buckets, to be reduced
    uint32_t tag;            // not 0
};
// Of a name: namespace and key.
Hash hash_of(uint64_t seed, uint64_t space, const void* key, size_t key_bytes);

}  // namespace p2pkv::directory
