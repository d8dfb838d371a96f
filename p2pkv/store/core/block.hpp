// A block: one occupancy of one slot. Owned by the store; whoever holds a BlockRef may read what is constant.
#pragma once
#include <atomic>
#include <cstring>
#include <memory>
#include <string_view>

#include "store_types.hpp"

namespace p2pkv::store {

struct Space;

// Neighbours in one of the intrusive lists (list.hpp): no allocation, and a block finds its own place in O(1).
struct Links {
    Block* before = nullptr;
    Block* after = nullptr;
};

// 176 bytes, 192 with the control block of its shared_ptr, as one allocation; 16 more in its slot and 8 to 16 in its
// namespace's table: 229 bytes per block measured over 300,000 (the reference: 338), so 230 MB for a million. The key lies inline at its greatest length: a
// second allocation for it would cost as much as it saves at the 16 to 32 bytes that engines use.
struct Block {
    Block(uint64_t space_id, Space* home, std::string_view name, uint32_t length, double now)
        : space_id(space_id), home(home), used_at(now), length(length), key_bytes(static_cast<uint8_t>(name.size())) {
        std::memcpy(key_data, name.data(), name.size());
    }
    std::string_view key() const { return {key_data, key_bytes}; }

    // Constant from the moment the block is given to anybody.
    const uint64_t space_id;
    uint64_t offset = 0;
    uint64_t generation = 0;

    // Under the store's mutex only.
    Space* home;  // while it is listed or being written in a namespace that is open; else null
    Block* next = nullptr;  // in its bucket of the namespace's table
    Links order;            // among those that can be evicted, the coldest first
    Links listed;           // among those of its namespace, the oldest first

    // Written under the store's mutex; others may look, and see some value that was true.
    std::atomic<double> used_at;
    const uint32_t length;
    std::atomic<uint32_t> pins{0};
    std::atomic<State> state{State::writing};
    std::atomic<bool> proven{false};  // `checksum` is there, for good
    const uint8_t key_bytes;
    uint32_t entry = ~uint32_t{0};  // in the directory; Directory::kNowhere: none. Under the store's mutex only
    char key_data[kKeyBytesMax];
    Digest checksum{};
};

}  // namespace p2pkv::store
