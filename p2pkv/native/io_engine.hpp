// One thread, one epoll set, many transfers: a stalled peer costs a table entry, not a thread.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "completions.hpp"
#include "transfer.hpp"

namespace p2pkv {

class IoEngine {
  public:
    explicit IoEngine(size_t transfers_max);
    ~IoEngine();

    int fd() const { return completions_.fd(); }
    // False when the table is full or the engine is stopped; the transfer was not started then.
    bool submit(std::unique_ptr<Transfer> transfer);
    // Its final event comes as for every transfer (`cancelled`, unless it had just ended by itself).
    void cancel(uint64_t job);
    std::vector<IoEvent> drain() { return completions_.drain(); }
    size_t active() const;
    void stop();

  private:
    struct Entry {
        std::unique_ptr<Transfer> transfer;
        uint32_t armed = 0;
        bool cancelled = false;
    };
    void run();
    void step(uint64_t job);
    void finish(uint64_t job, Entry& entry);
    void report(Transfer& transfer);
    void sweep();
    void arm_timer(Clock::time_point when);
    void wake();

    const size_t transfers_max_;
    const int epoll_;
    const int wake_fd_;
    const int timer_fd_;  // fires at the earliest deadline: submitting never has to wake the thread
    mutable std::mutex mutex_;  // guards the map's shape; an entry's transfer is touched by the I/O thread only
    std::unordered_map<uint64_t, Entry> entries_;
    Clock::time_point timer_at_ = Clock::time_point::max();
    bool stopping_ = false;
    Completions<IoEvent> completions_;
    std::thread thread_;
};

}  // namespace p2pkv
