#include "copier.hpp"

#include <pthread.h>

namespace p2pkv {
Copier::~Copier() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

std::optional<Copier::Done> Copier::submit(uint64_t id, uint64_t space, std::vector<Item> items, uint64_t block_bytes) {
    auto job = std::make_shared<Job>();
    job->id = id;
    job->space = space;
    job->block_bytes = block_bytes;
    job->done = {id, std::vector<unsigned char>(items.size(), 0)};
    job->items = std::move(items);
    const bool several = job->items.size() > 1, here = job->items.size() * block_bytes <= kNowBytes;
    {
        std::lock_guard lock(mutex_);
        while (!here && threads_.size() < threads_max_) threads_.emplace_back([this] { run(); });
        if (!here) jobs_.push_back(job);
        ++unfinished_;
    }
    if (here) {
        for (size_t i = job->items.size(); i-- > 0;) job->done.came[i] = copy(*job, i);
        std::lock_guard lock(mutex_);
        one_less();
        return std::move(job->done);
    }
    several ? work_.notify_all() : work_.notify_one();
    return std::nullopt;
}

bool Copier::copy_now(uint64_t space, const std::string_view* keys, unsigned char* const* to, size_t count,
                      uint64_t block_bytes) {
    {
        std::lock_guard lock(mutex_);
        ++unfinished_;
    }
    bool good = true;
    for (size_t i = 0; good && i < count; ++i) good = reader_.has(space, keys[i], block_bytes);
    for (size_t i = count; good && i-- > 0;) good = reader_.copy(space, keys[i], to[i], block_bytes, false);
    std::lock_guard lock(mutex_);
    one_less();
    return good;
}

bool Copier::copy(const Job& job, size_t index) const {
    const bool away = job.items.size() * job.block_bytes > kNowBytes;  // so much does not stay in a cache anyway
    return reader_.copy(job.space, job.items[index].key, job.items[index].to, job.block_bytes, away);
}

void Copier::finished(Job& job) {
    completions_.push(std::move(job.done));
    one_less();
}

void Copier::one_less() {
    if (--unfinished_ == 0) idle_.notify_all();
}

void Copier::call_off() {
    std::unique_lock lock(mutex_);
    for (const std::shared_ptr<Job>& job : jobs_) {
        job->finished += job->items.size() - job->next;
        job->next = job->items.size();
        if (job->finished == job->items.size()) finished(*job);
    }
    jobs_.clear();
    idle_.wait(lock, [this] { return unfinished_ == 0; });
}

void Copier::run() {
    pthread_setname_np(pthread_self(), "p2pkv-copier");
    std::unique_lock lock(mutex_);
    while (true) {
        work_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
        if (stopping_) return;
        const std::shared_ptr<Job> job = jobs_.front();
        // Of a chain the last key first, so that the tail is the one that was used earliest.
        const size_t index = job->items.size() - 1 - job->next++;
        if (job->next == job->items.size()) jobs_.pop_front();
        lock.unlock();
        const bool came = copy(*job, index);
        lock.lock();
        job->done.came[index] = came;
        if (++job->finished == job->items.size()) finished(*job);
    }
}

}  // namespace p2pkv
