// An engine's own loads: blocks of the arena copied into its region by threads of its own process, found in the directory.
#pragma once
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "completions.hpp"
#include "directory_reader.hpp"

namespace p2pkv {

class Copier {
  public:
    static constexpr uint64_t kNowBytes = 4 << 20;  // half a millisecond at most, where to wake a thread takes 50 us
    // So much is more than a core's own cache holds: it is written past the caches. Who loads computes or sends it on later.
    static constexpr uint64_t kAwayBytes = 2 << 20;

    struct Item {
        std::string key;
        unsigned char* to;
    };
    struct Done {
        uint64_t job;
        std::vector<unsigned char> came;  // per item: 1 where the block's bytes are there
    };
    enum class Taken {
        no,     // after end(), or there is no thread to be had: nothing was done
        done,   // `done` says what came
        later,  // it comes out of drain()
    };

    // The reader stays the caller's, and has to outlive this. Threads are started by the first job.
    Copier(const DirectoryReader& reader, unsigned threads) : reader_(reader), threads_max_(threads) {}
    ~Copier();
    Copier(const Copier&) = delete;
    Copier& operator=(const Copier&) = delete;

    int fd() const { return completions_.fd(); }
    // Up to kNowBytes are copied here; more by the threads. Thread-safe. What `to` points to has to stay until it is done, or
    // until call_off() or end() has returned.
    Taken submit(uint64_t job, uint64_t space, std::vector<Item> items, uint64_t block_bytes, Done* done);
    // Likewise, for at most kNowBytes, without a job: the last block first, until one does not come. False: one did not.
    bool copy_now(uint64_t space, const std::string_view* keys, unsigned char* const* to, size_t count, uint64_t block_bytes);
    std::vector<Done> drain() { return completions_.drain(); }
    // Wake whoever watches fd(), with a job of number 0.
    void wake() { completions_.push({0, {}}); }
    // Give up what is not begun, and wait for what is: a block per thread. All jobs that were submitted before come out of
    // drain() then. Not for what begins meanwhile.
    void call_off();
    // Likewise, and for good: nothing is taken any more.
    void end();

  private:
    struct Job {
        uint64_t id, space, block_bytes, round;
        std::vector<Item> items;
        size_t next = 0, finished = 0;
        Done done;
    };
    void run();
    bool copy(const Job& job, size_t index) const;
    // With the lock:
    bool threads_run();
    void give_up(std::unique_lock<std::mutex>& lock);
    uint64_t one_more();  // in which round
    void one_less(uint64_t round);
    void finished(Job& job);

    const DirectoryReader& reader_;
    const unsigned threads_max_;
    std::mutex mutex_;  // guards what follows
    std::condition_variable work_, idle_;
    std::deque<std::shared_ptr<Job>> jobs_;
    uint64_t round_ = 0;                     // so many times all was called off
    std::map<uint64_t, size_t> unfinished_;  // of those that began in each round
    bool ended_ = false, stopping_ = false;
    std::vector<std::thread> threads_;
    Completions<Done> completions_;
};

}  // namespace p2pkv
