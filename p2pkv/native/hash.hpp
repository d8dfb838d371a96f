// xxh3_128 for the vector width of this CPU. Same digest for every width; canonical (big-endian) byte order.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace p2pkv {

using Digest = std::array<unsigned char, 16>;

// Opaque room for one XXH3_state_t, whatever the width it was compiled for.
struct alignas(64) HashState {
    unsigned char bytes[640];
};

struct HashOps {
    Digest (*oneshot)(const void* data, size_t length);
    void (*reset)(HashState*);
    void (*update)(HashState*, const void* data, size_t length);
    Digest (*digest)(const HashState*);
    const char* name;
};

extern const HashOps hash_ops_baseline;
extern const HashOps hash_ops_avx2;
extern const HashOps hash_ops_avx512;

// Chosen once, at load time, from what the CPU says it has.
const HashOps& hash_ops();

}  // namespace p2pkv
