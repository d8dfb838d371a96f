#include "postings.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace p2pkv::index {
namespace {

constexpr std::uint64_t kTagMask = 3;
constexpr std::uint64_t kOne = 1;
constexpr std::uint64_t kTwo = 2;
constexpr std::uint64_t kMany = 3;
constexpr std::uint64_t kInlineMask = 0x7FFFFFFF;  // 31 bits per inline owner
constexpr std::size_t kMinCapacity = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20U;

constexpr std::uint64_t word_of(Owner a) { return (static_cast<std::uint64_t>(a) << 2U) | kOne; }
constexpr std::uint64_t word_of(Owner a, Owner b) {
  if (a > b) std::swap(a, b);
  return (static_cast<std::uint64_t>(b) << 33U) | (static_cast<std::uint64_t>(a) << 2U) | kTwo;
}
constexpr Owner first_of(std::uint64_t word) { return static_cast<Owner>((word >> 2U) & kInlineMask); }
constexpr Owner second_of(std::uint64_t word) { return static_cast<Owner>((word >> 33U) & kInlineMask); }

PostingTable::Slot* allocate_slots(std::size_t capacity) {
  const std::size_t bytes = capacity * sizeof(PostingTable::Slot);
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  // Every probe is a random access: with 4 KiB pages most of its cost is the TLB miss. Advice only: may be refused.
  if (bytes >= kHugePage) (void)madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  std::memset(memory, 0, bytes);
  return static_cast<PostingTable::Slot*>(memory);
}

}  // namespace

struct PostingTable::Vector {
  std::uint32_t size;
  std::uint32_t capacity;
  Owner* owners() { return reinterpret_cast<Owner*>(this + 1); }
  const Owner* owners() const { return reinterpret_cast<const Owner*>(this + 1); }
  /// First owner whose node is not below `node`.
  std::uint32_t lower(std::uint32_t node) const {
    return static_cast<std::uint32_t>(std::lower_bound(owners(), owners() + size, make_owner(node, 0)) - owners());
  }
  static Vector* of(std::uint64_t word) { return reinterpret_cast<Vector*>(word & ~kTagMask); }
  std::uint64_t word() const { return reinterpret_cast<std::uint64_t>(this) | kMany; }
  static std::size_t bytes(std::uint32_t capacity) { return sizeof(Vector) + capacity * sizeof(Owner); }
};

PostingTable::PostingTable(std::uint64_t seed) : seed_(seed) {
  slots_ = allocate_slots(kMinCapacity);
  mask_ = kMinCapacity - 1;
}

PostingTable::~PostingTable() {
  if (vectors_ != 0) {
    for (std::size_t i = 0; i <= mask_; ++i)
      if ((slots_[i].word & kTagMask) == kMany) std::free(Vector::of(slots_[i].word));
  }
  std::free(slots_);
}

std::size_t PostingTable::locate(Key key) const {
  std::size_t i = home(key);
  while (slots_[i].word != 0 && slots_[i].key != key) i = (i + 1) & mask_;
  return i;
}

std::span<const Owner> PostingTable::owners_at(std::size_t slot, Inline& scratch) const {
  const std::uint64_t word = slots_[slot].word;
  switch (word & kTagMask) {
    case kOne:
      scratch[0] = first_of(word);
      return {scratch, 1};
    case kTwo:
      scratch[0] = first_of(word);
      scratch[1] = second_of(word);
      return {scratch, 2};
    case kMany: {
      const Vector* vector = Vector::of(word);
      return {vector->owners(), vector->size};
    }
    default:
      return {};
  }
}

std::span<const Owner> PostingTable::owners(Key key, Inline& scratch) const { return owners_at(locate(key), scratch); }

std::uint32_t PostingTable::tier_at(std::size_t slot, std::uint32_t node) const {
  Inline scratch;
  const auto list = owners_at(slot, scratch);
  const auto at = std::lower_bound(list.begin(), list.end(), make_owner(node, 0));
  return at != list.end() && node_of(*at) == node ? tier_of(*at) : 0;
}

std::uint32_t PostingTable::set(Key key, std::uint32_t node, std::uint32_t tier) {
  const Owner owner = make_owner(node, tier);
  std::size_t i = locate(key);
  if (slots_[i].word == 0) {
    if (keys_ + 1 > capacity() / 4 * 3) {  // longer probe chains above three quarters cost more than the memory saved
      resize(capacity() * 2);
      i = locate(key);
    }
    slots_[i] = {key, word_of(owner)};
    ++keys_;
    ++postings_;
    return 0;
  }
  Slot& slot = slots_[i];
  switch (slot.word & kTagMask) {
    case kOne: {
      const Owner had = first_of(slot.word);
      if (node_of(had) == node) {
        slot.word = word_of(owner);
        return tier_of(had);
      }
      slot.word = word_of(had, owner);
      ++postings_;
      return 0;
    }
    case kTwo: {
      const Owner a = first_of(slot.word);
      const Owner b = second_of(slot.word);
      if (node_of(a) == node) {
        slot.word = word_of(owner, b);
        return tier_of(a);
      }
      if (node_of(b) == node) {
        slot.word = word_of(a, owner);
        return tier_of(b);
      }
      Vector* vector = make_vector(4);
      Owner* list = vector->owners();
      list[0] = a;
      list[1] = b;
      list[2] = owner;
      std::sort(list, list + 3);
      vector->size = 3;
      slot.word = vector->word();
      ++postings_;
      return 0;
    }
    default:
      return set_in_vector(slot, owner);
  }
}

std::uint32_t PostingTable::set_in_vector(Slot& slot, Owner owner) {
  Vector* vector = Vector::of(slot.word);
  const std::uint32_t at = vector->lower(node_of(owner));
  if (at < vector->size && node_of(vector->owners()[at]) == node_of(owner)) {
    const std::uint32_t had = tier_of(vector->owners()[at]);
    vector->owners()[at] = owner;
    return had;
  }
  if (vector->size == vector->capacity) {
    // Half as much again: a key that a whole fleet holds wastes at most a third.
    Vector* larger = make_vector(vector->capacity + vector->capacity / 2);
    larger->size = vector->size;
    std::memcpy(larger->owners(), vector->owners(), vector->size * sizeof(Owner));
    free_vector(vector);
    vector = larger;
    slot.word = vector->word();
  }
  Owner* list = vector->owners();
  std::memmove(list + at + 1, list + at, (vector->size - at) * sizeof(Owner));
  list[at] = owner;
  ++vector->size;
  ++postings_;
  return 0;
}

std::uint32_t PostingTable::remove_owner(Slot& slot, std::uint32_t node) {
  switch (slot.word & kTagMask) {
    case kOne: {
      const Owner a = first_of(slot.word);
      if (node_of(a) != node) return 0;
      slot.word = 0;
      return tier_of(a);
    }
    case kTwo: {
      const Owner a = first_of(slot.word);
      const Owner b = second_of(slot.word);
      if (node_of(a) == node) {
        slot.word = word_of(b);
        return tier_of(a);
      }
      if (node_of(b) == node) {
        slot.word = word_of(a);
        return tier_of(b);
      }
      return 0;
    }
    case kMany: {
      Vector* vector = Vector::of(slot.word);
      const std::uint32_t at = vector->lower(node);
      Owner* list = vector->owners();
      if (at == vector->size || node_of(list[at]) != node) return 0;
      const std::uint32_t had = tier_of(list[at]);
      std::memmove(list + at, list + at + 1, (vector->size - at - 1) * sizeof(Owner));
      if (--vector->size == 2) {
        slot.word = word_of(list[0], list[1]);
        free_vector(vector);
      }
      return had;
    }
    default:
      return 0;
  }
}

std::uint32_t PostingTable::erase_at(std::size_t slot, std::uint32_t node) {
  const std::uint32_t had = remove_owner(slots_[slot], node);
  if (had == 0) return 0;
  --postings_;
  if (slots_[slot].word == 0) erase_slot(slot);
  return had;
}

std::uint32_t PostingTable::erase(Key key, std::uint32_t node) { return erase_at(locate(key), node); }

void PostingTable::erase_slot(std::size_t slot) {
  --keys_;
  std::size_t hole = slot;
  for (std::size_t i = (slot + 1) & mask_; slots_[i].word != 0; i = (i + 1) & mask_) {
    // A key may move back to the hole unless the hole lies before its home (all distances around the ring).
    if (((i - home(slots_[i].key)) & mask_) >= ((i - hole) & mask_)) {
      slots_[hole] = slots_[i];
      hole = i;
    }
  }
  slots_[hole].word = 0;
}

void PostingTable::resize(std::size_t capacity) {
  Slot* old = slots_;
  const std::size_t old_capacity = mask_ + 1;
  slots_ = allocate_slots(capacity);  // throws before anything has changed
  mask_ = capacity - 1;
  for (std::size_t i = 0; i < old_capacity; ++i)
    if (old[i].word != 0) slots_[locate(old[i].key)] = old[i];
  std::free(old);
}

void PostingTable::shrink() noexcept {
  std::size_t capacity = this->capacity();
  while (capacity > kMinCapacity && keys_ < capacity / 8) capacity /= 2;
  if (capacity == this->capacity()) return;
  try {
    resize(capacity);
  } catch (const std::bad_alloc&) {  // still right, only larger than it need be
  }
}

PostingTable::Vector* PostingTable::make_vector(std::uint32_t capacity) {
  void* memory = std::malloc(Vector::bytes(capacity));
  if (memory == nullptr) throw std::bad_alloc();
  vector_bytes_ += Vector::bytes(capacity);
  ++vectors_;
  return new (memory) Vector{0, capacity};
}

void PostingTable::free_vector(Vector* vector) {
  vector_bytes_ -= Vector::bytes(vector->capacity);
  --vectors_;
  std::free(vector);
}

}  // namespace p2pkv::index
