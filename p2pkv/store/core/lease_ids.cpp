#include "lease_ids.hpp"

#include <sys/random.h>

#include <cerrno>
#include <system_error>

namespace p2pkv::store {

namespace {

void draw_bytes(void* to, size_t length) {
    auto* at = static_cast<unsigned char*>(to);
    while (length != 0) {
        const ssize_t got = getrandom(at, length, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw std::system_error(errno, std::generic_category(), "getrandom");
        at += got;
        length -= static_cast<size_t>(got);
    }
}

}  // namespace

void LeaseIds::draw(Batch* batch) { draw_bytes(batch->data(), sizeof(Batch)); }

void LeaseIds::refill(const Batch& batch) {
    if (left_.load(std::memory_order_relaxed) >= kLow) return;  // another thread was faster
    batch_ = batch;
    left_.store(batch_.size(), std::memory_order_relaxed);
}

uint64_t LeaseIds::next() {
    if (seed_) return mix64(*seed_ + ++count_);
    const size_t left = left_.load(std::memory_order_relaxed) - 1;
    left_.store(left, std::memory_order_relaxed);
    return batch_[left];
}

uint64_t mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

uint64_t random64() {
    uint64_t bits;
    draw_bytes(&bits, sizeof bits);
    return bits;
}

}  // namespace p2pkv::store
