// An array that grows without moving: chunks of a fixed number of items, mapped one by one, in huge pages where there are.
//
// The directory has its full length from the start, so that growing never copies anything and an item's address never
// changes. Chunks come zeroed. reserve() is apart from use, so that a writer can fault memory in before it takes the
// readers' lock: zeroing a huge page takes 100 us.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace p2pkv::index {

template <typename Item, unsigned kChunkBits, unsigned kIndexBits>
class Chunks {
 public:
  static constexpr std::size_t kItems = std::size_t{1} << kChunkBits;
  static constexpr std::size_t kMost = std::size_t{1} << kIndexBits;
  static constexpr std::size_t kBytes = kItems * sizeof(Item);

  Chunks() : chunks_(std::size_t{1} << (kIndexBits - kChunkBits), nullptr) {}
  ~Chunks() {
    for (Item* chunk : chunks_)
      if (chunk != nullptr) munmap(chunk, kBytes);
  }
  Chunks(const Chunks&) = delete;
  Chunks& operator=(const Chunks&) = delete;

  Item& operator[](std::size_t i) { return chunks_[i >> kChunkBits][i & (kItems - 1)]; }
  const Item& operator[](std::size_t i) const { return chunks_[i >> kChunkBits][i & (kItems - 1)]; }

  /// Make sure that items [0, end) can be used, and that those not touched so far are in memory. Throws std::bad_alloc.
  void reserve(std::size_t end) {
    if (end > kMost) throw std::bad_alloc();
    while (mapped_ < end) map(mapped_ >> kChunkBits);
    if (end > ready_) {
      // One touch per huge page; the next ones' faults, where there are only small pages, are short.
      const std::size_t step = std::max<std::size_t>(1, kHuge / sizeof(Item));
      const std::size_t to = std::min(mapped_, end + step);
      for (std::size_t i = ready_; i < to; i += step) touch(i);
      touch(to - 1);
      ready_ = to;
    }
  }

  /// Items that reserve() has made ready.
  std::size_t ready() const { return ready_; }

  /// Give the memory of items [begin, kMost) back, by whole chunks; they must be unused and are zero when used again.
  void release_from(std::size_t begin) noexcept {
    std::size_t chunk = (begin + kItems - 1) >> kChunkBits;
    const std::size_t end = mapped_ >> kChunkBits;
    mapped_ = std::min(mapped_, chunk << kChunkBits);
    ready_ = std::min(ready_, mapped_);
    for (; chunk < end; ++chunk) {
      munmap(chunks_[chunk], kBytes);
      chunks_[chunk] = nullptr;
    }
  }

 private:
  static constexpr std::size_t kHuge = std::size_t{2} << 20U;

  void map(std::size_t chunk) {
    // Aligned to huge pages: take more, give the ends back.
    const std::size_t length = (kBytes + kHuge - 1) / kHuge * kHuge;
    void* raw = mmap(nullptr, length + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) throw std::bad_alloc();
    const auto start = reinterpret_cast<std::uintptr_t>(raw);
    const std::uintptr_t aligned = (start + kHuge - 1) / kHuge * kHuge;
    if (aligned != start) munmap(raw, aligned - start);
    const std::uintptr_t used = aligned + (kBytes + 4095) / 4096 * 4096, end = start + length + kHuge;
    if (end != used) munmap(reinterpret_cast<void*>(used), end - used);
    madvise(reinterpret_cast<void*>(aligned), kBytes, MADV_HUGEPAGE);
    chunks_[chunk] = reinterpret_cast<Item*>(aligned);
    mapped_ += kItems;
  }

  void touch(std::size_t i) {
    volatile auto* byte = reinterpret_cast<volatile unsigned char*>(&(*this)[i]);
    *byte = *byte;
  }

  std::vector<Item*> chunks_;
  std::size_t mapped_ = 0;  // items of mapped chunks
  std::size_t ready_ = 0;   // items that have been touched
};

}  // namespace p2pkv::index
