// Where each key lies: a hash table of positions, which grows and shrinks by one cache line at a time.
//
// Linear hashing with partial expansions (Larson, 1980): a hash names a group of lines, and a line in it. One group after
// another gets a line more, from four up to eight; then each is two groups of four lines, with nothing moved. So no key ever
// waits for a rehash of the whole, and no line has more than 5/4 of another's load; where a bucket is split in two, as in
// Litwin's scheme, it is twice, which costs memory at both ends. At every size the table has 8.0 to 8.5 bytes a key.
//
// A line has 10 positions, each with 16 bits of its key's hash (a *tag*), so that a lookup that finds nothing ends there,
// and one that finds something reads the key's page next, which it needs anyway. A tag has the bits that say which line of a
// group, so that growth reads no keys: they are all over memory. What does not fit into its line goes into one that the
// group's lines share (its *rest*), and from there into further ones; a line that has any of its keys there is full.
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
  /// Its line, and what it shares: to look first whether that is needed costs more than to fetch it. Always inlined: a
  /// function that does nothing but prefetch is one without effects to gcc, and its calls are dropped.
  [[gnu::always_inline]] void prefetch(Key key) const {
    const std::uint64_t hash = hash_of(key);
    const Group group = group_of(hash);
    const unsigned home = home_of(hash, group);
    __builtin_prefetch(&line(group, home));
    __builtin_prefetch(&rest(group, home));
  }

  /// Makes sure that so many keys can be put in without an error. Throws std::bad_alloc. For a writer that does not hold
  /// the readers' lock yet: readers do not see it.
  void reserve(std::size_t more);
  /// `key` is not there yet, and lies at `position`.
  void insert(Key key, Position position);
  /// `key` is there, at `position`.
  void erase(Key key, Position position);
  /// `key` has moved.
  void move(Key key, Position from, Position to);

  /// Gives memory behind the last line back.
  void shrink() noexcept {
    lines_.release_from(lines() + 1);
    rests_.release_from(rests() + 1);
  }

  std::size_t keys() const { return keys_; }
  std::size_t capacity() const { return lines() * kPlaces; }
  std::size_t bytes() const { return (lines() + rests() + further_used_) * sizeof(Line); }

 private:
  static constexpr unsigned kPlaces = 10;
  // Keys per line, on average, from which on groups get lines, and below which they lose some.
  static constexpr double kFull = 9.5, kSparse = 4.5;
  static constexpr unsigned kLineBits = 28;
  static constexpr unsigned kNarrow = 4, kWidest = 8;  // lines of a group
  // Bits of the hash that a tag is: from this one on. Smaller tables look at the keys to double, which are near then.
  static constexpr unsigned kTagShift = 16;

  struct alignas(64) Line {
    std::uint16_t tags[kPlaces];
    std::uint32_t meta;  // what follows, and in the lowest four bits how many places are taken
    Position positions[kPlaces];

    unsigned count() const { return meta & 15U; }
    std::uint32_t taken() const { return (1U << count()) - 1; }
    /// 0: nothing. Of a rest and a further line: number + 1 of the further line. Else 1: some keys are in the rest.
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
  static_assert(sizeof(Line) == 64);

  /// So many lines that belong together: `number`, number + groups_, number + 2 groups_, ...
  struct Group {
    std::size_t number;
    unsigned width;
  };
  struct Spot {
    Line* line;
    unsigned place;
  };

  std::uint64_t hash_of(Key key) const { return mix64(key ^ seed_); }
  static std::uint16_t tag_of(std::uint64_t hash) { return static_cast<std::uint16_t>(hash >> kTagShift); }
  Group group_of(std::uint64_t hash) const {
    const std::size_t number = hash & (groups_ - 1);
    return {number, width_ + (number < widened_ ? 1U : 0U)};
  }
  /// A tag as a fraction of the width: one line more takes a key to the same line or to the one after it.
  static unsigned spread(std::uint16_t tag, unsigned width) { return unsigned{tag} * width >> 16U; }
  /// Which line of its group a key belongs in. Of eight, every other one is what becomes a group of its own.
  static unsigned home_of(std::uint16_t tag, bool doubling, unsigned width) {
    return width == kWidest ? 2 * spread(tag, kNarrow) + (doubling ? 1U : 0U) : spread(tag, width);
  }
  unsigned home_of(std::uint64_t hash, const Group& group) const {
    return home_of(tag_of(hash), (hash & groups_) != 0, group.width);
  }
  unsigned home_of(std::uint16_t tag, Position position, const Group& group) const;

  std::size_t lines() const { return groups_ * width_ + widened_; }
  std::size_t rests() const { return groups_ + (width_ == kWidest - 1 ? widened_ : 0); }
  Line& line(const Group& group, unsigned i) { return lines_[group.number + i * groups_]; }
  const Line& line(const Group& group, unsigned i) const { return lines_[group.number + i * groups_]; }
  /// Eight lines are two groups already, which only await their names.
  std::size_t rest_of(const Group& group, unsigned home) const {
    return group.number + (group.width == kWidest && home % 2 != 0 ? groups_ : 0);
  }
  Line& rest(const Group& group, unsigned home) { return rests_[rest_of(group, home)]; }
  const Line& rest(const Group& group, unsigned home) const { return rests_[rest_of(group, home)]; }
  Line& further(std::uint32_t next) { return further_[next - 1]; }
  const Line& further(std::uint32_t next) const { return further_[next - 1]; }

  static std::uint32_t matches(const Line& line, std::uint16_t tag);
  std::uint32_t at_home(const Line& line, unsigned home, const Group& group) const;
  Position find(const Line& line, std::uint16_t tag, Key key) const;
  Spot spot_of(std::uint64_t hash, Position position);
  void put_in_rest(Line& rest, std::uint16_t tag, Position position);
  void overflow(const Group& group, unsigned home, std::uint16_t tag, Position position);
  void refill(const Group& group, unsigned home);
  void tighten(Line& rest);
  void put(const Group& group, unsigned home, Line& first, std::uint16_t tag, Position position);
  void deal(const Group& group, Line* const* lines, const Line& from);
  void move_up(const Group& group, Line* const* lines);
  void regroup(const Group& from, unsigned width);
  void widen();
  void narrow();
  std::uint32_t take();
  void give(std::uint32_t next);
  bool lines_left() const;

  const Pages& pages_;
  const std::uint64_t seed_;
  Chunks<Line, 15, kLineBits> lines_;
  Chunks<Line, 15, kLineBits> rests_;
  Chunks<Line, 14, kLineBits> further_;
  std::vector<std::uint32_t> further_free_;  // numbers of further lines that are not in use
  std::size_t further_top_ = 0;
  std::size_t further_used_ = 0;
  std::size_t groups_;         // a power of two
  unsigned width_ = kNarrow;   // lines of a group: 4 to 7
  std::size_t widened_ = 0;    // so many groups, the first ones, have one line more
  std::size_t keys_ = 0;
};

}  // namespace p2pkv::index
