#include "workers.hpp"

namespace p2pkv {

bool run_item(Work work, const WorkItem& item, CopyDeadline deadline, Digest* digest) {
    switch (work) {
        case Work::copy: return guarded_copy(item.dst, item.src, item.length, deadline);
        case Work::copy_hash: return guarded_copy_hash(item.dst, item.src, item.length, deadline, digest);
        case Work::hash: return guarded_hash(item.src, item.length, digest);
    }
    return false;
}

Workers::Workers(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
}

Workers::~Workers() { stop(); }

void Workers::stop() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_)
        if (thread.joinable()) thread.join();
}

void Workers::submit(uint64_t id, Work work, std::vector<WorkItem> items, CopyDeadline deadline) {
    auto job = std::make_shared<Job>();
    job->id = id;
    job->work = work;
    job->deadline = deadline;
    job->result.job = id;
    job->result.ok.assign(items.size(), 0);
    job->result.digests.assign(items.size(), Digest{});
    job->items = std::move(items);
    if (job->items.empty()) {
        completions_.push(std::move(job->result));
        return;
    }
    {
        std::lock_guard lock(mutex_);
        jobs_.push_back(job);
    }
    if (job->items.size() > 1) {
        wake_.notify_all();
    } else {
        wake_.notify_one();
    }
}

size_t Workers::queued() const {
    std::lock_guard lock(mutex_);
    return jobs_.size();
}

void Workers::run() {
    std::unique_lock lock(mutex_);
    while (true) {
        wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
        if (stopping_) return;
        // Items of the oldest job first, shared between threads: a batch finishes as early as the memory bus allows.
        std::shared_ptr<Job> job = jobs_.front();
        const size_t index = job->next++;
        if (job->next == job->items.size()) jobs_.pop_front();
        lock.unlock();
        Digest digest{};
        const bool ok = run_item(job->work, job->items[index], job->deadline, &digest);
        lock.lock();
        job->result.ok[index] = ok ? 1 : 0;
        job->result.digests[index] = digest;
        if (++job->finished == job->items.size()) completions_.push(std::move(job->result));
    }
}

}  // namespace p2pkv
