// The posting table: which nodes hold a key, and in which tier. Plain C++: no Python, no locks, one thread at a time.
//
// One flat open-addressing array of 16-byte slots (linear probing, deletion by backward shift, so there are no
// tombstones and a lookup that misses ends at the first empty slot). A slot holds a key and one word:
//
//   word == 0            empty
//   word & 3 == 1        one owner inline
//   word & 3 == 2        two owners inline, ascending by node
//   word & 3 == 3        pointer to a sorted vector of owners
//
// Because emptiness lives in the word, every 64-bit key is legal, 0 and 2^64-1 included.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace p2pkv::index {

using Key = std::uint64_t;

/// node << 3 | tier: sorting owners sorts them by node, and comparing two owner lists compares tiers too.
using Owner = std::uint32_t;

inline constexpr std::uint32_t kTierBits = 3;
inline constexpr std::uint32_t kTierMask = (1U << kTierBits) - 1;
inline constexpr std::uint32_t kTierMax = 4;             // SHARED; 0 is GONE and is never stored
inline constexpr std::uint32_t kNodesLimit = 1U << 24U;  // owners must fit 31 bits of a slot's word, and 24 of a holder entry

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

class PostingTable {
 public:
  struct Slot {
    Key key;
    std::uint64_t word;
  };
  /// Where owners() decodes inline owners into; must live as long as the span it returned is used.
  using Inline = Owner[2];

  /// `seed` makes the place of a key unpredictable, so that nobody can craft keys that cluster.
  explicit PostingTable(std::uint64_t seed);
  ~PostingTable();
  PostingTable(const PostingTable&) = delete;
  PostingTable& operator=(const PostingTable&) = delete;

  /// Owners of `key`, ascending by node; empty when there are none. Valid until the next write.
  std::span<const Owner> owners(Key key, Inline& scratch) const;
  std::span<const Owner> owners_at(std::size_t slot, Inline& scratch) const;
  Key key_at(std::size_t slot) const { return slots_[slot].key; }
  /// Tier in which `node` has the key of slot number `slot`; 0 when it has not, or the slot is empty.
  std::uint32_t tier_at(std::size_t slot, std::uint32_t node) const;
  std::uint32_t tier(Key key, std::uint32_t node) const { return tier_at(locate(key), node); }
  void prefetch(Key key) const { __builtin_prefetch(&slots_[home(key)]); }

  /// Put `key` into `node`'s set in `tier` (1..4). Returns the tier it had there, 0 when it was not there.
  /// Throws std::bad_alloc and then has changed nothing.
  std::uint32_t set(Key key, std::uint32_t node, std::uint32_t tier);
  /// Take `key` out of `node`'s set. Returns the tier it had there, 0 when it was not there. Never allocates.
  std::uint32_t erase(Key key, std::uint32_t node);
  /// The same for whatever key lies in slot number `slot`. A later key of the probe chain may move into this slot, never
  /// into one before it that a sweep from 0 upwards has not already seen: sweep, and look at a slot again after a hit.
  std::uint32_t erase_at(std::size_t slot, std::uint32_t node);
  /// Halve the array while it is less than an eighth full; keeps what it has when memory is short.
  void shrink() noexcept;

  std::size_t capacity() const { return mask_ + 1; }
  std::size_t keys() const { return keys_; }
  std::size_t postings() const { return postings_; }
  std::size_t shared_keys() const { return vectors_; }
  std::size_t bytes() const { return capacity() * sizeof(Slot) + vector_bytes_; }

 private:
  struct Vector;

  std::size_t home(Key key) const { return mix64(key ^ seed_) & mask_; }
  std::size_t locate(Key key) const;  // its slot, or the empty slot where it belongs
  void resize(std::size_t capacity);
  void erase_slot(std::size_t slot);
  std::uint32_t remove_owner(Slot& slot, std::uint32_t node);
  std::uint32_t set_in_vector(Slot& slot, Owner owner);
  Vector* make_vector(std::uint32_t capacity);
  void free_vector(Vector* vector);

  Slot* slots_ = nullptr;
  std::size_t mask_ = 0;
  std::size_t keys_ = 0;
  std::size_t postings_ = 0;
  std::size_t vectors_ = 0;
  std::size_t vector_bytes_ = 0;
  std::uint64_t seed_;
};

}  // namespace p2pkv::index
