// How much may be sent in a second: a token bucket that lets an answer in while there is anything left, and then waits until
// what it cost is paid back (so a large answer is never refused for ever). Thread-safe.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <mutex>

namespace p2pkv {

class Allowance {
  public:
    // 0: no limit.
    explicit Allowance(double bytes_per_s) : bytes_per_s_(bytes_per_s), left_(bytes_per_s) {}

    // Whether so many bytes may be sent now; they are counted if so.
    bool take(uint64_t bytes) {
        if (bytes_per_s_ <= 0) return true;
        const auto now = std::chrono::steady_clock::now();
        std::lock_guard lock(mutex_);
        left_ = std::min(bytes_per_s_, left_ + bytes_per_s_ * std::chrono::duration<double>(now - at_).count());
        at_ = now;
        if (left_ <= 0) return false;
        left_ -= static_cast<double>(bytes);
        return true;
    }

  private:
    const double bytes_per_s_;
    std::mutex mutex_;
    double left_;  // of one second's worth
    std::chrono::steady_clock::time_point at_ = std::chrono::steady_clock::now();
};

}  // namespace p2pkv
