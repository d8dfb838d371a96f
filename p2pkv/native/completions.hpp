// A queue of finished work that wakes an event loop through an eventfd.
#pragma once
#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

namespace p2pkv {

template <typename Event>
class Completions {
  public:
    Completions() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
        if (fd_ < 0) throw std::runtime_error("eventfd failed");
    }
    ~Completions() { close(fd_); }
    Completions(const Completions&) = delete;
    Completions& operator=(const Completions&) = delete;

    int fd() const { return fd_; }

    void push(Event event) {
        bool wake;
        {
            std::lock_guard lock(mutex_);
            wake = events_.empty();
            events_.push_back(std::move(event));
        }
        if (wake) {
            const uint64_t one = 1;
            [[maybe_unused]] const ssize_t written = write(fd_, &one, sizeof one);
        }
    }

    std::vector<Event> drain() {
        uint64_t count;
        [[maybe_unused]] const ssize_t got = read(fd_, &count, sizeof count);
        std::vector<Event> out;
        std::lock_guard lock(mutex_);
        out.swap(events_);
        return out;
    }

  private:
    const int fd_;
    std::mutex mutex_;
    std::vector<Event> events_;
};

}  // namespace p2pkv
