// memcpy for whole blocks, at the same speed wherever source and destination lie.
#pragma once
#include <cstddef>

namespace p2pkv {

// The ranges must not overlap.
void copy_bytes(void* dst, const void* src, size_t length);

}  // namespace p2pkv
