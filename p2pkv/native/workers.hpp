// A few threads that copy and checksum memory without the GIL.
#pragma once
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "completions.hpp"
#include "guard.hpp"

namespace p2pkv {

enum class Work : int { copy = 0, copy_hash = 1, hash = 2 };

struct WorkItem {
    void* dst;
    const void* src;
    size_t length;
};

struct WorkDone {
    uint64_t job;
    std::vector<unsigned char> ok;  // one byte per item: 1 = done, 0 = memory was gone or the deadline passed
    std::vector<Digest> digests;    // one per item; zero where nothing was hashed
};

// Runs one item in the calling thread.
bool run_item(Work work, const WorkItem& item, CopyDeadline deadline, Digest* digest);

class Workers {
  public:
    explicit Workers(unsigned threads);
    ~Workers();

    int fd() const { return completions_.fd(); }
    void submit(uint64_t job, Work work, std::vector<WorkItem> items, CopyDeadline deadline);
    std::vector<WorkDone> drain() { return completions_.drain(); }
    size_t queued() const;
    void stop();

  private:
    struct Job {
        uint64_t id;
        Work work;
        std::vector<WorkItem> items;
        CopyDeadline deadline;
        size_t next = 0;
        size_t finished = 0;
        WorkDone result;
    };
    void run();

    mutable std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<std::shared_ptr<Job>> jobs_;
    bool stopping_ = false;
    Completions<WorkDone> completions_;
    std::vector<std::thread> threads_;
};

}  // namespace p2pkv
