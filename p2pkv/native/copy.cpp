#include "copy.hpp"

#include <cstdint>
#include <cstring>

// glibc's memcpy is `rep movsb` for sizes like ours, and on AMD's Zen 3 and 4 that takes 6 to 20 times as long where the
// destination lies just behind the source modulo 4 KiB (glibc bug 30994): a slot of the arena begins on a page, a Python
// bytearray 16 or 32 bytes after one. Plain vector moves are as fast as the best case of memcpy, in all cases.
#if defined(__x86_64__)
#include <immintrin.h>

namespace p2pkv {
namespace {

constexpr size_t kSmall = 2048;  // below this memcpy does not use `rep movsb`

__attribute__((target("avx"))) void copy_avx(char* dst, const char* src, size_t length) {
    const size_t head = -reinterpret_cast<uintptr_t>(dst) & 31;  // aligned stores: one cache line each
    std::memcpy(dst, src, head);
    dst += head, src += head, length -= head;
    for (; length >= 128; dst += 128, src += 128, length -= 128) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + 32));
        const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + 64));
        const __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + 96));
        _mm256_store_si256(reinterpret_cast<__m256i*>(dst), a);
        _mm256_store_si256(reinterpret_cast<__m256i*>(dst + 32), b);
        _mm256_store_si256(reinterpret_cast<__m256i*>(dst + 64), c);
        _mm256_store_si256(reinterpret_cast<__m256i*>(dst + 96), d);
    }
    std::memcpy(dst, src, length);
}

const bool has_avx = (__builtin_cpu_init(), __builtin_cpu_supports("avx") != 0);

}  // namespace

void copy_bytes(void* dst, const void* src, size_t length) {
    if (length < kSmall || !has_avx) {
        std::memcpy(dst, src, length);
    } else {
        copy_avx(static_cast<char*>(dst), static_cast<const char*>(src), length);
    }
}

}  // namespace p2pkv

#else

namespace p2pkv {

void copy_bytes(void* dst, const void* src, size_t length) { std::memcpy(dst, src, length); }

}  // namespace p2pkv

#endif
