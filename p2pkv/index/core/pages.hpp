// Pages: 64 keys side by side, in the order in which they came, and who holds which of them.
//
// Keys that come together are looked up together, so the chain of a prompt lies in a few pages and is compared at memory
// speed. Who holds what is a mask of 64 bits per (owner, tier) and page, sorted by owner: one owner of a whole page is
// 12 bytes, a hundred owners are a hundred times 12 bytes for 6,400 entries. Holes are zero bits.
//
// A *position* names a key: page << 6 | place in the page. It stays the key's for as long as anybody holds the key.
#pragma once

#include <cstdint>
#include <vector>

#include "chunks.hpp"
#include "keys.hpp"

namespace p2pkv::index {

using PageId = std::uint32_t;
using Position = std::uint32_t;
using Mask = std::uint64_t;

inline constexpr unsigned kPageBits = 6;
inline constexpr unsigned kPageKeys = 1U << kPageBits;
inline constexpr unsigned kPageIdBits = 32 - kPageBits;
inline constexpr PageId kNoPage = ~PageId{0};
inline constexpr Position kNowhere = ~Position{0};

inline constexpr PageId page_of(Position position) { return position >> kPageBits; }
inline constexpr unsigned place_of(Position position) { return position & (kPageKeys - 1); }
inline constexpr Position make_position(PageId page, unsigned place) { return (page << kPageBits) | place; }

/// `count` ones from bit `first` on; count is within 1..64 - first.
inline constexpr Mask ones(unsigned first, unsigned count) { return (~Mask{0} >> (64 - count)) << first; }

/// All zero is an empty page.
class alignas(64) Page {
 public:
  Key keys[kPageKeys];
  Mask live;             // places whose key somebody holds
  std::uint32_t opener;  // node + 1 whose new keys are appended here; 0: nobody's
  std::uint16_t used;    // places handed out so far

  std::uint32_t owners() const { return count_; }
  const Owner* owner() const { return room_ == 0 ? few_.owners : many_.owners; }  // ascending
  const Mask* mask() const { return room_ == 0 ? few_.masks : many_.masks; }

  /// Where `owner` is, or belongs.
  std::uint32_t find(Owner owner) const;
  /// Makes room for so many more owners. Throws std::bad_alloc and has then changed nothing.
  void make_room(std::uint32_t more);
  /// Adds ones to an owner's mask; there is room for it.
  void add(Owner owner, Mask ones);
  /// Leaves `mask` of owner number `i`; an owner without any is gone.
  void set(std::uint32_t i, Mask mask);
  /// Frees what was allocated. The owners are gone.
  void clear();
  std::size_t allocated() const { return room_ * (sizeof(Mask) + sizeof(Owner)); }
  /// Places that somebody holds, from the owners themselves.
  Mask held() const;

 private:
  static constexpr std::uint32_t kFew = 3;

  std::uint16_t pad_;
  std::uint32_t count_;
  std::uint32_t room_;  // of the allocation; 0: owners are in here
  struct Few {
    Mask masks[kFew];
    Owner owners[kFew];
  };
  struct Many {
    Mask* masks;  // the owners follow in the same allocation
    Owner* owners;
  };
  union {
    Few few_;
    Many many_;
  };
};
static_assert(sizeof(Page) == 576);

/// All pages. Lowest first, so that pages taken one after another are neighbours, and the end can be given back.
class Pages {
 public:
  Page& operator[](PageId id) { return pages_[id]; }
  const Page& operator[](PageId id) const { return pages_[id]; }
  Key key(Position position) const { return pages_[page_of(position)].keys[place_of(position)]; }

  /// Makes sure that so many pages can be taken without a fault or an error. Throws std::bad_alloc.
  void reserve(std::size_t more);
  PageId take();
  /// The page has been cleared.
  void give(PageId id);
  /// Gives memory behind the last page back.
  void shrink() noexcept { pages_.release_from(top_); }

  PageId top() const { return top_; }  // pages from here on have not been taken
  bool taken(PageId id) const { return id < top_ && (free_[id >> 6U] >> (id & 63U) & 1U) == 0; }
  std::size_t used() const { return top_ - free_count_; }
  std::size_t bytes() const { return used() * sizeof(Page) + free_.capacity() * sizeof(std::uint64_t); }

 private:
  Chunks<Page, 15, kPageIdBits> pages_;
  PageId top_ = 0;
  std::vector<std::uint64_t> free_;  // a bit per page below top_
  std::size_t free_count_ = 0;
  std::size_t lowest_ = 0;  // no word before this one has a free page
};

}  // namespace p2pkv::index
