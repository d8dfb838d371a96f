// Where each key lies: a hash table of positions, which grows and shrinks by one bucket at a time.
//
// Linear hashing (Litwin, 1980): buckets are split in order of their number, one per so many keys, and joined in the
// opposite order. No key ever waits for a rehash of the whole. A bucket is one cache line of 10 positions, each with 16 bits
// of its key's hash (a *tag*), so that a lookup that finds nothing ends there, and one that finds something reads the key's
// page next, which it needs anyway. A tag has the bit that a split asks for, so that a split reads no keys: they are
// all over memory, and one such read per key is what growth would cost. What does not fit goes into further lines, about
// one bucket in ten.
//
// Keys themselves are in the pages; `seed` makes their place here unpredictable, so that nobody can craft keys that cluster.
#pragma once

#include <cstdint>
#include <vector>

#include "chunks.hpp"
#include "pages.hpp"

namespace p2pkv::index {

class KeyTable {
 public:
  KeyTable(const Pages& pages, std::uint64_t seed);

  Position find(Key key) const;
  /// Always inlined: a function that does nothing but prefetch is one without effects to gcc, and its calls are dropped.
  [[gnu::always_inline]] void prefetch(Key key) const { __builtin_prefetch(&buckets_[bucket_of(hash_of(key))]); }

  /// Makes sure that so many keys can be put in without an error. Throws std::bad_alloc. For a writer that does not hold
  /// the readers' lock yet: readers do not see it.
  void reserve(std::size_t more);
  /// `key` is not there yet, and lies at `position`.
  void insert(Key key, Position position);
  /// `key` is there, at `position`.
  void erase(Key key, Position position);
  /// `key` has moved.
  void move(Key key, Position from, Position to);

  /// Gives memory behind the last bucket back.
  void shrink() noexcept { buckets_.release_from(buckets() + 2); }

  std::size_t keys() const { return keys_; }
  std::size_t capacity() const { return buckets() * kPlaces; }
  std::size_t bytes() const { return (buckets() + further_used_) * sizeof(Bucket); }

 private:
  static constexpr unsigned kPlaces = 10;
  // Keys per bucket, on average, from which on buckets are split, and below which they are joined.
  static constexpr double kFull = 5.5, kSparse = 2.5;
  static constexpr unsigned kBucketBits = 28;
  // Bits of the hash that a tag is: from this one on. Smaller tables look at the keys to split, which are near then.
  static constexpr unsigned kTagShift = 14;

  struct alignas(64) Bucket {
    std::uint16_t tags[kPlaces];
    std::uint32_t meta;  // number of the further line + 1, and in the lowest four bits how many places are taken
    Position positions[kPlaces];

    unsigned count() const { return meta & 15U; }
    std::uint32_t next() const { return meta >> 4U; }
    void set_next(std::uint32_t next) { meta = next << 4U | count(); }
    void add(std::uint16_t tag, Position position) {
      tags[count()] = tag;
      positions[count()] = position;
      ++meta;
    }
    void remove(unsigned place) {
      --meta;
      tags[place] = tags[count()];
      positions[place] = positions[count()];
    }
  };
  static_assert(sizeof(Bucket) == 64);

  std::uint64_t hash_of(Key key) const { return mix64(key ^ seed_); }
  static std::uint16_t tag_of(std::uint64_t hash) { return static_cast<std::uint16_t>(hash >> kTagShift); }
  std::size_t bucket_of(std::uint64_t hash) const {
    const std::size_t bucket = hash & (2 * level_ - 1);
    return bucket < level_ + split_ ? bucket : bucket - level_;
  }
  std::size_t buckets() const { return level_ + split_; }
  static std::uint32_t matches(const Bucket& bucket, std::uint16_t tag);

  struct Spot {
    Bucket* bucket;
    unsigned place;
  };
  Spot spot_of(std::uint64_t hash, Position position);
  void put(Bucket& first, std::uint16_t tag, Position position);
  void prune(Bucket& first);
  void drain(Bucket& from, Bucket& to);
  bool moves(std::uint16_t tag, Position position) const;
  bool line_left() const { return !further_free_.empty() || further_.ready() > further_top_; }
  void split();
  void join();
  void give(std::uint32_t next);
  Bucket& further(std::uint32_t next) { return further_[next - 1]; }
  const Bucket& further(std::uint32_t next) const { return further_[next - 1]; }

  const Pages& pages_;
  const std::uint64_t seed_;
  Chunks<Bucket, 15, kBucketBits> buckets_;
  Chunks<Bucket, 14, kBucketBits> further_;
  std::vector<std::uint32_t> further_free_;  // numbers of further buckets that are not in use
  std::size_t further_top_ = 0;
  std::size_t further_used_ = 0;
  std::size_t level_;      // a power of two: buckets of a table of this round's beginning
  std::size_t split_ = 0;  // so many of them have been split
  std::size_t keys_ = 0;
};

}  // namespace p2pkv::index
