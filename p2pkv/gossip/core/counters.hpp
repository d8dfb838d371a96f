// Frame counters: each is given out once, and admitted once.
//
// A sliding window as in IPsec (RFC 4303, 3.4.3): what is younger than all before moves it, what is within it is admitted
// where its bit is not set yet, what is behind it is not.
#pragma once

#include <array>
#include <cstdint>

namespace p2pkv::gossip {

/// The counters of one life of this node. Not thread-safe, for it must not give one out twice.
class FrameCounter {
 public:
  explicit FrameCounter(std::uint64_t first = 0) : next_(first) {}
  std::uint64_t take() { return next_++; }
  std::uint64_t taken() const { return next_; }

 private:
  std::uint64_t next_;
};

/// The counters that one life of another node has used.
class ReplayWindow {
 public:
  /// How far behind the youngest frame one may come: two seconds of a busy sender.
  static constexpr std::uint64_t kFrames = 1'024;

  /// Not given out: the one after it would be the first again.
  static constexpr std::uint64_t kNever = ~std::uint64_t{0};

  bool fresh(std::uint64_t counter) const {
    if (counter >= next_) return counter != kNever;
    return next_ - counter <= kFrames && (word(counter) & bit(counter)) == 0;
  }
  void use(std::uint64_t counter) {
    if (counter >= next_) {
      const std::uint64_t ahead = counter - next_ + 1;
      if (ahead >= kFrames)
        seen_.fill(0);
      else
        for (std::uint64_t c = next_; c <= counter; ++c) seen_[c / 64 % kWords] &= ~bit(c);
      next_ = counter + 1;
    }
    seen_[counter / 64 % kWords] |= bit(counter);
  }

 private:
  static constexpr std::size_t kWords = kFrames / 64;
  static std::uint64_t bit(std::uint64_t counter) { return std::uint64_t{1} << (counter % 64); }
  std::uint64_t word(std::uint64_t counter) const { return seen_[counter / 64 % kWords]; }

  std::uint64_t next_ = 0;  // the youngest one used, and one
  std::array<std::uint64_t, kWords> seen_{};
};

}  // namespace p2pkv::gossip
