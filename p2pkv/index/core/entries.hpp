// What other native code may do to the entries of an index without going through Python. An interface and nothing else,
// so that only this header has to be shared between the extensions. One caller at a time; no method throws.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace p2pkv::index {

/// Packed little-endian u64 keys, borrowed and perhaps unaligned, that are in one tier.
struct TierKeys {
  std::uint32_t tier;
  const void* keys;
  std::size_t count;
};

class Entries {
 public:
  /// `slot` now has these keys in `tier` (0: no longer has them). False: there is no more room; some may be applied.
  virtual bool apply(std::uint32_t slot, const void* keys, std::size_t count, std::uint32_t tier) = 0;
  /// The slot's whole set becomes this. False: there is no more room.
  virtual bool replace(std::uint32_t slot, const std::vector<TierKeys>& groups) = 0;
  /// Forget all that the slot has, and that it was hidden.
  virtual void remove(std::uint32_t slot) = 0;
  /// Out of every answer, or back in them.
  virtual void hide(std::uint32_t slot, bool hidden) = 0;
  /// XOR of entry_checksum over the slot's set. O(1), and the next one too.
  virtual std::uint64_t checksum(std::uint32_t slot) const = 0;
  virtual std::size_t count(std::uint32_t slot) const = 0;
  /// The slot's set: keys by tier - 1.
  virtual void list(std::uint32_t slot, std::vector<std::uint64_t> (&by_tier)[4]) const = 0;

 protected:
  ~Entries() = default;
};

inline constexpr const char* kEntriesCapsule = "p2pkv.index.Entries";

}  // namespace p2pkv::index
