// The store's words: what every part of it and every caller must agree on.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
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

}  // namespace p2pkv::store
