// A queue of finished work that wakes an event loop through a descriptor.
#pragma once
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
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
    Completions()
        : fd_(epoll_create1(EPOLL_CLOEXEC)),
          bell_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
          timer_(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)) {
        if (fd_ < 0 || bell_ < 0 || timer_ < 0) throw std::runtime_error("epoll, eventfd or timerfd failed");
        for (const int each : {bell_, timer_}) {
            epoll_event event{};
            event.events = EPOLLIN;
            epoll_ctl(fd_, EPOLL_CTL_ADD, each, &event);
        }
    }
    ~Completions() {
        for (const int each : {fd_, bell_, timer_}) close(each);
    }
    Completions(const Completions&) = delete;
    Completions& operator=(const Completions&) = delete;

    int fd() const { return fd_; }

    void push(Event event) {
        if (!add(std::move(event), true)) return;
        const uint64_t one = 1;
        [[maybe_unused]] const ssize_t written = write(bell_, &one, sizeof one);
    }

    // Nobody waits for this one: the loop is woken in a moment, when those who do have been served.
    void push_later(Event event) {
        if (!add(std::move(event), false)) return;
        const itimerspec moment{{0, 0}, {0, kMomentNs}};
        timerfd_settime(timer_, 0, &moment, nullptr);
    }

    std::vector<Event> drain() {
        uint64_t count;
        for (const int each : {bell_, timer_}) [[maybe_unused]] const ssize_t got = read(each, &count, sizeof count);
        std::vector<Event> out;
        std::lock_guard lock(mutex_);
        out.swap(events_);
        woken_ = false;
        return out;
    }

  private:
    static constexpr long kMomentNs = 1'000'000;

    // Whether somebody has to be woken for it.
    bool add(Event event, bool now) {
        std::lock_guard lock(mutex_);
        const bool first = events_.empty();
        events_.push_back(std::move(event));
        return now ? !std::exchange(woken_, true) : first;
    }

    const int fd_, bell_, timer_;
    std::mutex mutex_;
    std::vector<Event> events_;
    bool woken_ = false;
};

}  // namespace p2pkv
