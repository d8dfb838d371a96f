// The body of hash_*.cpp: includes xxHash inline, so that each file compiles it for its own vector width.
#pragma once
#define XXH_INLINE_ALL
#define XXH_STATIC_LINKING_ONLY
#include <cstring>
#include <new>

#include "hash.hpp"
#include "xxhash.h"

namespace p2pkv {
namespace {

static_assert(sizeof(XXH3_state_t) <= sizeof(HashState), "HashState is too small for this xxHash");

Digest canonical(XXH128_hash_t hash) {
    XXH128_canonical_t bytes;
    XXH128_canonicalFromHash(&bytes, hash);
    Digest out;
    std::memcpy(out.data(), bytes.digest, out.size());
    return out;
}

Digest oneshot(const void* data, size_t length) { return canonical(XXH3_128bits(data, length)); }

void reset(HashState* state) {
    auto* s = new (state->bytes) XXH3_state_t;
    XXH3_INITSTATE(s);
    XXH3_128bits_reset(s);
}

void update(HashState* state, const void* data, size_t length) {
    XXH3_128bits_update(reinterpret_cast<XXH3_state_t*>(state->bytes), data, length);
}

Digest digest(const HashState* state) {
    return canonical(XXH3_128bits_digest(reinterpret_cast<const XXH3_state_t*>(state->bytes)));
}

}  // namespace
}  // namespace p2pkv
