// A lock for many readers who never sleep and one writer who gives way.
//
// Both hold it for a few microseconds, so waiting means looking: a futex's sleep and wake cost ten times the wait, and
// would be the tail of every lookup. Each reader counts itself in a line of its own, so that readers on different
// processors do not pass one line around. The writer, once it has let go, waits (some tens of microseconds at most)
// until whoever waited for it is in: else a batch written slice by slice would shut readers out for its whole length.
#pragma once

#include <sched.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace p2pkv::index {

class ReadersLock {
 public:
  void lock_shared() {
    std::atomic<std::uint32_t>& mine = counts_[stripe()].value;
    mine.fetch_add(1);
    if (!writing_.load()) [[likely]] return;
    blocked_.fetch_add(1);
    for (;;) {
      mine.fetch_sub(1);
      for (unsigned turn = 1; writing_.load(std::memory_order_relaxed); ++turn) pause(turn);
      mine.fetch_add(1);
      if (!writing_.load()) break;
    }
    blocked_.fetch_sub(1);
  }
  void unlock_shared() { counts_[stripe()].value.fetch_sub(1, std::memory_order_release); }

  /// One writer at a time: a mutex around this is the caller's.
  void lock() {
    writing_.store(true);
    for (auto& count : counts_)
      for (unsigned turn = 1; count.value.load() != 0; ++turn) pause(turn);
  }
  void unlock() {
    writing_.store(false);
    for (unsigned turn = 1; turn < kGiveWay && blocked_.load(std::memory_order_relaxed) != 0; ++turn) pause(turn);
  }

 private:
  static constexpr std::size_t kStripes = 16;
  static constexpr unsigned kSpins = 256;  // a few microseconds; whoever is waited for may have lost its processor
  static constexpr unsigned kGiveWay = 4 * kSpins;

  static void pause(unsigned turn) {
    if (turn % kSpins == 0) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static std::size_t stripe() {
    static std::atomic<std::size_t> next{0};
    thread_local const std::size_t mine = next.fetch_add(1, std::memory_order_relaxed) % kStripes;
    return mine;
  }

  struct alignas(64) Count {
    std::atomic<std::uint32_t> value{0};
  };
  std::array<Count, kStripes> counts_;
  alignas(64) std::atomic<bool> writing_{false};
  alignas(64) std::atomic<std::uint32_t> blocked_{0};
};

}  // namespace p2pkv::index
