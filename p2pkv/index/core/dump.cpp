// The index page by page, as bytes: what a dump file is made of (p2pkv/index/dump.py).
//
// A record is one page's keys that somebody listed holds, and who holds which of them:
//   u32 keys (1..64)   u32 holders (1 or more)   u64 key, each   u64 mask, each holder's   u32 number << 3 | tier, each
// A holder is named by its number in the caller's list of slots. Little-endian, not aligned.
#include <algorithm>
#include <cstring>
#include <string>

#include "prefix_index.hpp"

namespace p2pkv::index {
namespace {

// Under the readers' lock at once, a few microseconds: a writer that waits for us stops every other reader.
constexpr unsigned kPagesPerSlice = 4;
constexpr std::size_t kHoldersPerSlice = 512;
constexpr std::uint32_t kNotListed = ~0U;

/// The bits of `mask` at the places of `places`, side by side.
Mask squeeze(Mask mask, Mask places) {
  if (places == ~Mask{0}) return mask;
  Mask out = 0;
  for (unsigned n = 0; places != 0; places &= places - 1, ++n) out |= (mask >> std::countr_zero(places) & 1U) << n;
  return out;
}

template <typename T>
void append_to(std::vector<unsigned char>& out, const T* items, std::size_t count) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(items);
  out.insert(out.end(), bytes, bytes + count * sizeof(T));
}

template <typename T>
T get(const unsigned char* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

[[noreturn]] void refuse(const char* what) { throw std::invalid_argument(std::string("a record of pages ") + what); }

}  // namespace

/// A pass over all pages while readers and writers go on. What is removed meanwhile may make the writer move what lay
/// beside it to another page: that may be in the pass twice, or not at all.
std::size_t PrefixIndex::dump_pages(const std::vector<std::uint32_t>& slots, std::size_t from, std::size_t bytes_most,
                                    std::vector<unsigned char>& out) const {
  std::vector<std::uint32_t> number_of;
  for (std::size_t n = 0; n < slots.size(); ++n) {
    const std::uint32_t slot = check_node(slots[n]);
    if (slot >= number_of.size()) number_of.resize(slot + 1, kNotListed);
    if (number_of[slot] != kNotListed) throw std::invalid_argument("a slot is listed twice");
    number_of[slot] = static_cast<std::uint32_t>(n);
  }
  struct Copy {
    Key keys[kPageKeys];
    Mask held;
    std::size_t holders_end;  // of the slice's; they begin where those of the page before end
  };
  std::vector<Copy> copies(kPagesPerSlice);
  std::vector<Mask> masks;
  std::vector<std::uint32_t> holders;
  masks.reserve(2 * kHoldersPerSlice);
  holders.reserve(2 * kHoldersPerSlice);
  out.reserve(bytes_most + kPagesPerSlice * sizeof(Page));
  auto id = static_cast<PageId>(std::min<std::size_t>(from, kNoPage));
  bool over = false;
  while (!over && out.size() < bytes_most) {
    masks.clear();
    holders.clear();
    std::size_t copied = 0;
    {
      const std::shared_lock lock(lock_);
      for (unsigned n = 0; n < kPagesPerSlice && holders.size() < kHoldersPerSlice && !over; ++n) {
        over = id >= pages_.top();
        if (over) break;
        const Page& page = pages_[id++];  // a free one has no owners (which are free is the writer's to know)
        Copy& copy = copies[copied];
        copy.held = 0;
        for (std::uint32_t o = 0; o < page.owners(); ++o) {
          const std::uint32_t node = node_of(page.owner()[o]);
          if (node >= number_of.size() || number_of[node] == kNotListed) continue;
          copy.held |= page.mask()[o];
          masks.push_back(page.mask()[o]);
          holders.push_back(make_owner(number_of[node], tier_of(page.owner()[o])));
        }
        if (copy.held == 0) continue;
        std::memcpy(copy.keys, page.keys, sizeof copy.keys);
        copy.holders_end = holders.size();
        ++copied;
      }
    }
    std::size_t at = 0;
    for (std::size_t n = 0; n < copied; ++n) {
      const Copy& copy = copies[n];
      const std::size_t count = copy.holders_end - at;
      for (std::size_t h = at; h < copy.holders_end; ++h) masks[h] = squeeze(masks[h], copy.held);
      const std::uint32_t counts[] = {static_cast<std::uint32_t>(std::popcount(copy.held)), static_cast<std::uint32_t>(count)};
      append_to(out, counts, 2);
      for (Mask left = copy.held; left != 0; left &= left - 1) append_to(out, &copy.keys[std::countr_zero(left)], 1);
      append_to(out, &masks[at], count);
      append_to(out, &holders[at], count);
      at = copy.holders_end;
    }
  }
  return over ? 0 : id;
}

/// Puts whole records in; what is behind the last one is left. Returns how many bytes they are.
std::size_t PrefixIndex::load_pages(const unsigned char* data, std::size_t size, const std::vector<std::int64_t>& slots) {
  constexpr std::size_t kHead = 2 * sizeof(std::uint32_t);
  constexpr std::size_t kEach = sizeof(Mask) + sizeof(Owner);
  std::size_t at = 0;
  while (size - at >= kHead) {
    const auto keys = get<std::uint32_t>(data + at);
    const auto holders = get<std::uint32_t>(data + at + sizeof(std::uint32_t));
    if (keys == 0 && holders == 0) break;  // the end of them all; the caller's
    if (keys < 1 || keys > kPageKeys) refuse("has no key, or more than a page's");
    if (holders < 1 || holders > slots.size() * kTierMax) refuse("has no holder, or more than there are");
    if ((size - at - kHead) / kEach < holders || size - at - kHead - holders * kEach < keys * sizeof(Key)) break;
    const unsigned char* const key = data + at + kHead;
    const unsigned char* const mask = key + keys * sizeof(Key);
    const unsigned char* const holder = mask + holders * sizeof(Mask);
    for (std::uint32_t n = 0; n < holders; ++n) {
      const auto ones_of = get<Mask>(mask + n * sizeof(Mask));
      const auto named = get<Owner>(holder + n * sizeof(Owner));
      if (ones_of == 0 || (ones_of & ~ones(0, keys)) != 0) refuse("has a mask that does not fit its keys");
      if (node_of(named) >= slots.size() || tier_of(named) < 1 || tier_of(named) > kTierMax)
        refuse("names a holder that is not listed");
      const std::int64_t slot = slots[node_of(named)];
      if (slot < 0) continue;  // left out
      Key held[kPageKeys];
      std::size_t count = 0;
      for (Mask left = ones_of; left != 0; left &= left - 1)
        held[count++] = get<Key>(key + static_cast<unsigned>(std::countr_zero(left)) * sizeof(Key));
      apply(slot, Keys(held, count), tier_of(named));
    }
    at += kHead + keys * sizeof(Key) + holders * kEach;
  }
  return at;
}

}  // namespace p2pkv::index
