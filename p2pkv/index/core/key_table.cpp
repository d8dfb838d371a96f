#include "key_table.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace p2pkv::index {
namespace {
constexpr std::size_t kFirstGroups = 4;
// Further lines that a group may need when it is dealt out anew: eight lines and two rests all of one line.
constexpr std::size_t kDealt = 10;

// A bit per tag, of ten: which ones are `tag`, and of which ones tag * width >> 16 is `home`.
#if defined(__SSE2__)
std::uint32_t equal(__m128i low, __m128i high, unsigned wanted) {
  const __m128i all = _mm_set1_epi16(static_cast<short>(wanted));
  const auto both = static_cast<std::uint32_t>(
      _mm_movemask_epi8(_mm_packs_epi16(_mm_cmpeq_epi16(low, all), _mm_cmpeq_epi16(high, all))));
  return (both & 0xFFU) | (both >> 6U & 0x300U);
}

std::uint32_t equal(const std::uint16_t* tags, std::uint16_t tag) {
  return equal(_mm_load_si128(reinterpret_cast<const __m128i*>(tags)),
               _mm_loadu_si128(reinterpret_cast<const __m128i*>(tags + 2)), tag);
}

std::uint32_t spread_equal(const std::uint16_t* tags, unsigned width, unsigned home) {
  const __m128i factor = _mm_set1_epi16(static_cast<short>(width));
  return equal(_mm_mulhi_epu16(_mm_load_si128(reinterpret_cast<const __m128i*>(tags)), factor),
               _mm_mulhi_epu16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tags + 2)), factor), home);
}
#else
std::uint32_t equal(const std::uint16_t* tags, std::uint16_t tag) {
  std::uint32_t found = 0;
  for (unsigned i = 0; i < 10; ++i) found |= std::uint32_t{tags[i] == tag} << i;
  return found;
}

std::uint32_t spread_equal(const std::uint16_t* tags, unsigned width, unsigned home) {
  std::uint32_t found = 0;
  for (unsigned i = 0; i < 10; ++i) found |= std::uint32_t{(unsigned{tags[i]} * width >> 16U) == home} << i;
  return found;
}
#endif
}  // namespace

KeyTable::KeyTable(const Pages& pages, std::uint64_t seed) : pages_(pages), seed_(seed), groups_(kFirstGroups) {
  lines_.reserve(kFirstGroups * kNarrow);
  rests_.reserve(kFirstGroups);
}

/// A bit per place of the line that has this tag.
std::uint32_t KeyTable::matches(const Line& line, std::uint16_t tag) { return equal(line.tags, tag) & line.taken(); }

/// A bit per place of the line, or rest, whose key belongs in this line of the group.
std::uint32_t KeyTable::at_home(const Line& line, unsigned home, const Group& group) const {
  if (group.width < kWidest) return spread_equal(line.tags, group.width, home) & line.taken();
  std::uint32_t found = 0;
  for (unsigned place = 0; place < line.count(); ++place)
    found |= std::uint32_t{home_of(line.tags[place], line.positions[place], group) == home} << place;
  return found;
}

Position KeyTable::find(const Line& line, std::uint16_t tag, Key key) const {
  for (std::uint32_t found = matches(line, tag); found != 0; found &= found - 1) {
    const Position position = line.positions[std::countr_zero(found)];
    if (pages_.key(position) == key) return position;
  }
  return kNowhere;
}

Position KeyTable::find(Key key) const {
  const std::uint64_t hash = hash_of(key);
  const std::uint16_t tag = tag_of(hash);
  const Group group = group_of(hash);
  const unsigned home = home_of(hash, group);
  const Line& first = line(group, home);
  Position position = find(first, tag, key);
  if (position != kNowhere || first.next() == 0) return position;
  for (const Line* at = &rest(group, home);; at = &further(at->next()))
    if (position = find(*at, tag, key); position != kNowhere || at->next() == 0) return position;
}

KeyTable::Spot KeyTable::spot_of(std::uint64_t hash, Position position) {
  const std::uint16_t tag = tag_of(hash);
  const Group group = group_of(hash);
  const unsigned home = home_of(hash, group);
  Line* const first = &line(group, home);
  for (Line* at = first;; at = at == first ? &rest(group, home) : &further(at->next())) {
    for (std::uint32_t found = matches(*at, tag); found != 0; found &= found - 1) {
      const auto place = static_cast<unsigned>(std::countr_zero(found));
      if (at->positions[place] == position) return {at, place};
    }
  }
}

unsigned KeyTable::home_of(std::uint16_t tag, Position position, const Group& group) const {
  const std::size_t of_tag = groups_ >> kTagShift;
  const bool doubling =
      group.width == kWidest && (of_tag != 0 ? tag & of_tag : hash_of(pages_.key(position)) & groups_) != 0;
  return home_of(tag, doubling, group.width);
}

void KeyTable::reserve(std::size_t more) {
  // Each key may give one group a line, and need one further line for itself and those of a group that is dealt out anew.
  lines_.reserve(lines() + more + 1);
  rests_.reserve(rests() + more + 1);
  const std::size_t lines = (kDealt + 1) * (more + 1);
  if (further_free_.size() < lines) further_.reserve(further_top_ + lines - further_free_.size());
  if (further_free_.capacity() < further_top_ + lines) further_free_.reserve(2 * (further_top_ + lines));
}

/// Whether a group can be dealt out anew, whatever is in it.
bool KeyTable::lines_left() const {
  return further_free_.size() + (further_.ready() - further_top_) >= kDealt &&
         further_free_.capacity() >= further_top_ + kDealt;
}

/// A further line, empty. Its number + 1.
std::uint32_t KeyTable::take() {
  std::uint32_t number;
  if (further_free_.empty()) {
    number = static_cast<std::uint32_t>(further_top_++);
  } else {
    number = further_free_.back();
    further_free_.pop_back();
  }
  ++further_used_;
  further_[number] = Line{};
  return number + 1;
}

/// A further line is not in use any more. Room for its number is reserved.
void KeyTable::give(std::uint32_t next) {
  further_free_.push_back(next - 1);
  --further_used_;
}

/// Into its line, or behind it.
[[gnu::always_inline]] inline void KeyTable::put(const Group& group, unsigned home, Line& first, std::uint16_t tag,
                                                 Position position) {
  if (first.count() < kPlaces) return first.add(tag, position);
  first.set_next(1);
  put_in_rest(rest(group, home), tag, position);
}

void KeyTable::put_in_rest(Line& rest, std::uint16_t tag, Position position) {
  Line* last = &rest;
  while (last->next() != 0) last = &further(last->next());
  if (last->count() == kPlaces) {
    last->set_next(take());
    last = &further(last->next());
  }
  last->add(tag, position);
}

/// A key of this line has gone, from it or from the rest: another one moves up.
void KeyTable::refill(const Group& group, unsigned home) {
  Line& to = line(group, home);
  std::uint32_t left = 0;
  for (Line* at = &rest(group, home);; at = &further(at->next())) {
    std::uint32_t ours = at_home(*at, home, group);
    if (ours != 0 && to.count() < kPlaces) {
      const auto place = static_cast<unsigned>(std::countr_zero(ours));
      to.add(at->tags[place], at->positions[place]);
      at->remove(place);
      ours &= ours - 1;  // only how many are left counts: places have changed
    }
    left |= ours;
    if (at->next() == 0) break;
  }
  if (left == 0) to.set_next(0);
  tighten(rest(group, home));
}

/// Fills holes in a rest and its further lines from the last one, and gives that back when it is empty.
void KeyTable::tighten(Line& rest) {
  for (Line* at = &rest; at->next() != 0;) {
    if (at->count() == kPlaces) {
      at = &further(at->next());
      continue;
    }
    Line* before = at;
    while (further(before->next()).next() != 0) before = &further(before->next());
    Line& last = further(before->next());
    if (last.count() != 0) {
      at->add(last.tags[last.count() - 1], last.positions[last.count() - 1]);
      last.remove(last.count() - 1);
    }
    if (last.count() == 0) {
      give(before->next());
      before->set_next(0);
    }
  }
}

void KeyTable::insert(Key key, Position position) {
  const std::uint64_t hash = hash_of(key);
  const Group group = group_of(hash);
  const unsigned home = home_of(hash, group);
  put(group, home, line(group, home), tag_of(hash), position);
  if (static_cast<double>(++keys_) > kFull * static_cast<double>(lines())) widen();
}

void KeyTable::erase(Key key, Position position) {
  const std::uint64_t hash = hash_of(key);
  const auto [at, place] = spot_of(hash, position);
  at->remove(place);
  const Group group = group_of(hash);
  if (const unsigned home = home_of(hash, group); line(group, home).next() != 0) refill(group, home);
  --keys_;
  if (static_cast<double>(keys_) < kSparse * static_cast<double>(lines()) && lines() > kFirstGroups * kNarrow &&
      lines_left())
    narrow();
}

void KeyTable::move(Key key, Position from, Position to) {
  const auto [at, place] = spot_of(hash_of(key), from);
  at->positions[place] = to;
}

void KeyTable::deal(const Group& group, Line* const* lines, const Line& from) {
  for (unsigned place = 0; place < from.count(); ++place) {
    const unsigned home = home_of(from.tags[place], from.positions[place], group);
    put(group, home, *lines[home], from.tags[place], from.positions[place]);
  }
}

/// A group has one line more, its last one, which is empty: keys move to it, to the line before it from the one before that,
/// and so on.
void KeyTable::move_up(const Group& group, Line* const* lines) {
  for (unsigned home = group.width - 1; home-- != 0;) {
    Line& from = *lines[home];
    for (std::uint32_t movers = from.taken() & ~at_home(from, home, group); movers != 0;) {
      const unsigned place = 31U - static_cast<unsigned>(std::countl_zero(movers));  // from the end: remove() fills from there
      movers ^= 1U << place;
      put(group, home + 1, *lines[home + 1], from.tags[place], from.positions[place]);
      from.remove(place);
    }
  }
}

/// Deals out what is in a group over so many lines.
void KeyTable::regroup(const Group& from, unsigned width) {
  const Group to{from.number, width};
  const bool one_more = width == from.width + 1 && width < kWidest;
  Line* lines[kWidest];
  Line old[kWidest + 2];
  unsigned count = 0;
  if (!one_more) {
    for (; count < from.width; ++count) old[count] = line(from, count);
  }
  const unsigned rests = count;
  for (unsigned home = 0; home < (from.width == kWidest ? 2U : 1U); ++home) old[count++] = rest(from, home);

  if (width == kWidest && groups_ >> kTagShift == 0) {  // the keys will be looked at
    for (unsigned i = 0; i < count; ++i) {
      for (unsigned place = 0; place < old[i].count(); ++place) {
        const Position position = old[i].positions[place];
        __builtin_prefetch(&pages_[page_of(position)].keys[place_of(position)]);
      }
    }
  }
  for (unsigned i = 0; i < width; ++i) {
    lines[i] = &line(to, i);
    lines[i]->meta = one_more && i < from.width ? lines[i]->count() : 0;
  }
  rest(to, 0).meta = rest(to, 1).meta = 0;
  if (one_more) move_up(to, lines);
  for (unsigned i = 0; i < count; ++i) {
    deal(to, lines, old[i]);
    for (std::uint32_t next = i < rests ? 0 : old[i].next(); next != 0;) {
      const Line rest = further(next);
      give(next);
      deal(to, lines, rest);
      next = rest.next();
    }
  }
}

/// Gives the next group a line, the table's new last one.
void KeyTable::widen() {
  regroup({widened_, width_}, width_ + 1);
  if (++widened_ == groups_) {
    widened_ = 0;
    if (++width_ == kWidest) {
      width_ = kNarrow;
      groups_ *= 2;
    }
  }
  const Group soon{widened_, width_};
  for (unsigned i = 0; i <= width_; ++i) __builtin_prefetch(&line(soon, i));
  __builtin_prefetch(&rest(soon, 0));
}

/// Takes the table's last line away.
void KeyTable::narrow() {
  if (widened_ == 0) {
    if (width_ == kNarrow) {
      width_ = kWidest;
      groups_ /= 2;
    }
    --width_;
    widened_ = groups_;
  }
  --widened_;
  regroup({widened_, width_ + 1}, width_);
}

}  // namespace p2pkv::index
