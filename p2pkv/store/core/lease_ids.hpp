// Numbers for leases that nobody can guess: 64 bits each, never 0, from the kernel's generator, 512 at a time.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <optional>

namespace p2pkv::store {

class LeaseIds {
  public:
    using Batch = std::array<uint64_t, 512>;  // 4 KiB: one system call of some 10 us per 512 leases

    // With a seed: mix64(seed + 1), mix64(seed + 2), ...: distinct numbers that anybody can compute. For tests.
    explicit LeaseIds(std::optional<uint64_t> seed) : seed_(seed) {}

    // Whether a batch should be drawn, before the store's mutex is taken. May be asked without it.
    bool low() const { return !seed_ && left_.load(std::memory_order_relaxed) < kLow; }
    // From getrandom(2); without the mutex. Throws std::system_error.
    static void draw(Batch* batch);

    // The rest under the store's mutex.
    void refill(const Batch& batch);
    bool empty() const { return !seed_ && left_.load(std::memory_order_relaxed) < kSpare; }
    uint64_t next();  // unless empty. May be 0 or an id in use: then ask again

  private:
    static constexpr size_t kLow = 128;  // leases that may be granted while another thread draws
    static constexpr size_t kSpare = 8;  // nobody meets eight ids in use, or zeros, in a row
    const std::optional<uint64_t> seed_;
    uint64_t count_ = 0;
    std::atomic<size_t> left_{0};
    Batch batch_{};
};

// Finalizer of splitmix64, as p2pkv.types.mix64.
uint64_t mix64(uint64_t x);

// 64 bits from the kernel. Throws std::system_error.
uint64_t random64();

}  // namespace p2pkv::store
