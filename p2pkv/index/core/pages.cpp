#include "pages.hpp"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace p2pkv::index {

std::uint32_t Page::find(Owner wanted) const {
  const Owner* begin = owner();
  return static_cast<std::uint32_t>(std::lower_bound(begin, begin + count_, wanted) - begin);
}

void Page::make_room(std::uint32_t more) {
  const std::uint32_t needed = count_ + more;
  if (needed <= (room_ == 0 ? kFew : room_)) return;
  // Half as much again; sizes that allocators have no waste with are not worth their arithmetic here.
  const std::uint32_t room = std::max(needed, count_ + count_ / 2 + 1);
  void* raw = std::malloc(room * (sizeof(Mask) + sizeof(Owner)));
  if (raw == nullptr) throw std::bad_alloc();
  Many many{static_cast<Mask*>(raw), reinterpret_cast<Owner*>(static_cast<Mask*>(raw) + room)};
  std::memcpy(many.masks, mask(), count_ * sizeof(Mask));
  std::memcpy(many.owners, owner(), count_ * sizeof(Owner));
  if (room_ != 0) std::free(many_.masks);
  many_ = many;
  room_ = room;
}

void Page::add(Owner wanted, Mask ones) {
  const std::uint32_t i = find(wanted);
  Owner* owners = const_cast<Owner*>(owner());
  Mask* masks = const_cast<Mask*>(mask());
  if (i < count_ && owners[i] == wanted) {
    masks[i] |= ones;
    return;
  }
  std::memmove(owners + i + 1, owners + i, (count_ - i) * sizeof(Owner));
  std::memmove(masks + i + 1, masks + i, (count_ - i) * sizeof(Mask));
  owners[i] = wanted;
  masks[i] = ones;
  ++count_;
}

void Page::set(std::uint32_t i, Mask value) {
  Owner* owners = const_cast<Owner*>(owner());
  Mask* masks = const_cast<Mask*>(mask());
  masks[i] = value;
  if (value != 0) return;
  --count_;
  std::memmove(owners + i, owners + i + 1, (count_ - i) * sizeof(Owner));
  std::memmove(masks + i, masks + i + 1, (count_ - i) * sizeof(Mask));
  if (room_ == 0 || count_ >= kFew) return;  // one below what fits: an owner that changes its tier must find room again
  const Many many = many_;
  room_ = 0;
  std::memcpy(few_.masks, many.masks, count_ * sizeof(Mask));
  std::memcpy(few_.owners, many.owners, count_ * sizeof(Owner));
  std::free(many.masks);
}

void Page::clear() {
  if (room_ != 0) std::free(many_.masks);
  room_ = count_ = 0;
  live = 0;
  opener = 0;
  used = 0;
}

Mask Page::held() const {
  Mask all = 0;
  const Mask* masks = mask();
  for (std::uint32_t i = 0; i < count_; ++i) all |= masks[i];
  return all;
}

void Pages::reserve(std::size_t more) {
  if (more <= free_count_) return;
  const std::size_t end = top_ + (more - free_count_);
  pages_.reserve(end);
  const std::size_t words = (end + 63) / 64;
  if (words > free_.size()) free_.resize(std::max(words, free_.size() + free_.size() / 4));
}

PageId Pages::take() {
  if (free_count_ == 0) return top_++;
  while (free_[lowest_] == 0) ++lowest_;
  const auto bit = static_cast<unsigned>(std::countr_zero(free_[lowest_]));
  free_[lowest_] &= free_[lowest_] - 1;
  --free_count_;
  return static_cast<PageId>(lowest_ * 64 + bit);
}

void Pages::give(PageId id) {
  free_[id >> 6U] |= std::uint64_t{1} << (id & 63U);
  ++free_count_;
  lowest_ = std::min<std::size_t>(lowest_, id >> 6U);
  while (top_ != 0 && (free_[(top_ - 1) >> 6U] >> ((top_ - 1) & 63U) & 1U) != 0) {
    --top_;
    free_[top_ >> 6U] &= ~(std::uint64_t{1} << (top_ & 63U));
    --free_count_;
  }
  if (free_count_ == 0) lowest_ = 0;
}

}  // namespace p2pkv::index
