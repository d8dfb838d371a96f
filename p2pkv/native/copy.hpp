// memcpy for whole blocks, at the same speed wherever source and destination lie.
#pragma once
#include <cstddef>

namespace p2pkv {

// The ranges must not overlap.
void copy_bytes(void* dst, const void* src, size_t length);

// For destinations that nobody on this processor reads soon, as an engine's staging memory, from where blocks go to a GPU:
// written past the caches, without reading what was there. Twice as fast where the destination is cold, and what is in the
// caches (the next block to be copied, above all) stays there.
void copy_away(void* dst, const void* src, size_t length);

}  // namespace p2pkv
