// Keys, owners and what both are made of. See docs/index.md for the whole.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace p2pkv::index {

static_assert(std::endian::native == std::endian::little, "packed keys are little-endian on the wire and here");

using Key = std::uint64_t;

/// node << 3 | tier: sorting owners sorts them by node.
using Owner = std::uint32_t;

inline constexpr std::uint32_t kTierBits = 3;
inline constexpr std::uint32_t kTierMask = (1U << kTierBits) - 1;
inline constexpr std::uint32_t kTierMax = 4;             // SHARED; 0 is GONE and is never stored
inline constexpr std::uint32_t kNodesLimit = 1U << 24U;  // 24 bits in a holder entry

inline constexpr std::uint32_t node_of(Owner owner) { return owner >> kTierBits; }
inline constexpr std::uint32_t tier_of(Owner owner) { return owner & kTierMask; }
inline constexpr Owner make_owner(std::uint32_t node, std::uint32_t tier) { return (node << kTierBits) | tier; }

/// splitmix64's step (Steele, Lea, Flood 2014); equal to p2pkv.types.mix64.
inline constexpr std::uint64_t mix64(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27U)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31U);
}

/// What one (key, tier) entry adds (by XOR) to its owner's set checksum; equal to p2pkv.index.hashing.entry_checksum.
inline constexpr std::uint64_t entry_checksum(Key key, std::uint32_t tier) { return mix64(key ^ mix64(tier)); }

/// A caller's packed little-endian u64 keys. Borrowed, may be unaligned (a slice of a frame): read through memcpy.
class Keys {
 public:
  Keys(const void* data, std::size_t size) : data_(static_cast<const unsigned char*>(data)), size_(size) {}
  std::size_t size() const { return size_; }
  Key operator[](std::size_t i) const {
    Key key;
    std::memcpy(&key, data_ + i * sizeof(Key), sizeof(Key));
    return key;
  }

  /// How many keys from number `i` on are equal, one by one, to the `most` at `others`.
  std::uint32_t same_run(std::size_t i, const Key* others, std::uint32_t most) const {
    std::uint32_t n = 0;
    for (; n + 8 <= most; n += 8)
      if (std::memcmp(data_ + (i + n) * sizeof(Key), others + n, 8 * sizeof(Key)) != 0) break;
    while (n < most && (*this)[i + n] == others[n]) ++n;
    return n;
  }

 private:
  const unsigned char* data_;
  std::size_t size_;
};

}  // namespace p2pkv::index
