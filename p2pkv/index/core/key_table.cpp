#include "key_table.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace p2pkv::index {
namespace {
constexpr std::size_t kFirstBuckets = 16;
}

KeyTable::KeyTable(const Pages& pages, std::uint64_t seed) : pages_(pages), seed_(seed), level_(kFirstBuckets) {
  buckets_.reserve(2 * kFirstBuckets);
}

/// A bit per place of the bucket that has this tag.
std::uint32_t KeyTable::matches(const Bucket& bucket, std::uint16_t tag) {
  const std::uint32_t taken = (1U << bucket.count()) - 1;
#if defined(__SSE2__)
  const __m128i wanted = _mm_set1_epi16(static_cast<short>(tag));
  const __m128i low = _mm_cmpeq_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(bucket.tags)), wanted);
  const __m128i high = _mm_cmpeq_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bucket.tags + 2)), wanted);
  const auto both = static_cast<std::uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
  return ((both & 0xFFU) | (both >> 6U & 0x300U)) & taken;
#else
  std::uint32_t found = 0;
  for (unsigned i = 0; i < kPlaces; ++i) found |= std::uint32_t{bucket.tags[i] == tag} << i;
  return found & taken;
#endif
}

Position KeyTable::find(Key key) const {
  const std::uint64_t hash = hash_of(key);
  const std::uint16_t tag = tag_of(hash);
  const Bucket* bucket = &buckets_[bucket_of(hash)];
  for (;;) {
    for (std::uint32_t found = matches(*bucket, tag); found != 0; found &= found - 1) {
      const Position position = bucket->positions[std::countr_zero(found)];
      if (pages_.key(position) == key) return position;
    }
    if (bucket->next() == 0) return kNowhere;
    bucket = &further(bucket->next());
  }
}

KeyTable::Spot KeyTable::spot_of(std::uint64_t hash, Position position) {
  const std::uint16_t tag = tag_of(hash);
  Bucket* bucket = &buckets_[bucket_of(hash)];
  for (;;) {
    for (std::uint32_t found = matches(*bucket, tag); found != 0; found &= found - 1) {
      const auto place = static_cast<unsigned>(std::countr_zero(found));
      if (bucket->positions[place] == position) return {bucket, place};
    }
    bucket = &further(bucket->next());
  }
}

void KeyTable::reserve(std::size_t more) {
  // Each key may split one bucket, and need one further line for itself and one for what a split moves.
  const std::size_t end = buckets() + more + 2;
  buckets_.reserve(end);
  const std::size_t lines = 2 * more + 2;
  if (further_free_.size() < lines) further_.reserve(further_top_ + lines - further_free_.size());
  if (further_free_.capacity() < further_top_ + lines) further_free_.reserve(2 * (further_top_ + lines));
}

void KeyTable::put(Bucket& first, std::uint16_t tag, Position position) {
  Bucket* bucket = &first;
  while (bucket->count() == kPlaces) {
    if (bucket->next() == 0) {
      std::uint32_t number;
      if (further_free_.empty()) {
        number = static_cast<std::uint32_t>(further_top_++);
      } else {
        number = further_free_.back();
        further_free_.pop_back();
      }
      ++further_used_;
      further_[number] = Bucket{};
      bucket->set_next(number + 1);
    }
    bucket = &further(bucket->next());
  }
  bucket->add(tag, position);
}

/// A further line is not in use any more. Room for its number is reserved.
void KeyTable::give(std::uint32_t next) {
  further_free_.push_back(next - 1);
  --further_used_;
}

/// Gives back further lines that are empty.
void KeyTable::prune(Bucket& first) {
  for (Bucket* bucket = &first; bucket->next() != 0;) {
    const std::uint32_t next = bucket->next();
    if (further(next).count() != 0) {
      bucket = &further(next);
      continue;
    }
    bucket->set_next(further(next).next());
    give(next);
  }
}

void KeyTable::insert(Key key, Position position) {
  const std::uint64_t hash = hash_of(key);
  put(buckets_[bucket_of(hash)], tag_of(hash), position);
  if (static_cast<double>(++keys_) > kFull * static_cast<double>(buckets())) split();
}

void KeyTable::erase(Key key, Position position) {
  const std::uint64_t hash = hash_of(key);
  const auto [bucket, place] = spot_of(hash, position);
  bucket->remove(place);
  Bucket& first = buckets_[bucket_of(hash)];
  if (first.next() != 0) prune(first);
  --keys_;
  if (static_cast<double>(keys_) < kSparse * static_cast<double>(buckets()) && buckets() > kFirstBuckets && line_left())
    join();  // which may need one more line
}

void KeyTable::move(Key key, Position from, Position to) {
  const auto [bucket, place] = spot_of(hash_of(key), from);
  bucket->positions[place] = to;
}

/// Whether a split takes it to the new bucket.
bool KeyTable::moves(std::uint16_t tag, Position position) const {
  const std::size_t of_tag = level_ >> kTagShift;
  return ((of_tag != 0 ? tag & of_tag : hash_of(pages_.key(position)) & level_)) != 0;
}

/// Puts all that is in `from` and its further lines into `to`, and gives those lines back.
void KeyTable::drain(Bucket& from, Bucket& to) {
  for (;;) {
    for (unsigned place = 0; place < from.count(); ++place) put(to, from.tags[place], from.positions[place]);
    const std::uint32_t next = from.next();
    if (next == 0) return;
    from = further(next);
    give(next);
  }
}

/// Divides bucket number split_ between itself and a new last one.
void KeyTable::split() {
  Bucket& old = buckets_[split_];
  Bucket& young = buckets_[level_ + split_];
  young = Bucket{};
  for (Bucket* bucket = &old;; bucket = &further(bucket->next())) {
    for (unsigned place = 0; place < bucket->count();) {
      if (moves(bucket->tags[place], bucket->positions[place])) {
        put(young, bucket->tags[place], bucket->positions[place]);
        bucket->remove(place);
      } else {
        ++place;
      }
    }
    if (bucket->next() == 0) break;
  }
  if (old.next() != 0) {  // what is left moves up, so that further lines become free
    Bucket rest = old;
    old = Bucket{};
    drain(rest, old);
  }
  if (++split_ == level_) {
    level_ *= 2;
    split_ = 0;
  }
  __builtin_prefetch(&buckets_[split_ + 1]);
}

/// Moves the last bucket back into the one it was divided from.
void KeyTable::join() {
  if (split_ == 0) {
    level_ /= 2;
    split_ = level_;
  }
  --split_;
  drain(buckets_[level_ + split_], buckets_[split_]);
}

}  // namespace p2pkv::index
