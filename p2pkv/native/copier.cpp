#include "copier.hpp"

#include <pthread.h>

#include <algorithm>
#include <system_error>

namespace p2pkv {
Copier::~Copier() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

Copier::Taken Copier::submit(uint64_t id, uint64_t space, std::vector<Item> items, uint64_t block_bytes, Done* done) {
    auto job = std::make_shared<Job>();
    job->id = id;
    job->space = space;
    job->block_bytes = block_bytes;
    job->done = {id, std::vector<unsigned char>(items.size(), 0)};
    job->items = std::move(items);
    const bool several = job->items.size() > 1, here = job->items.size() * block_bytes <= kNowBytes;
    {
        std::lock_guard lock(mutex_);
        if (ended_ || (!here && !threads_run())) return Taken::no;
        job->round = one_more();
        if (!here) jobs_.push_back(job);
    }
    if (here) {
        for (size_t i = job->items.size(); i-- > 0;) job->done.came[i] = copy(*job, i);
        *done = std::move(job->done);
        std::lock_guard lock(mutex_);
        one_less(job->round);
        return Taken::done;
    }
    several ? work_.notify_all() : work_.notify_one();
    return Taken::later;
}

// Whether there is one at least: where the system gives no more, fewer do.
bool Copier::threads_run() {
    threads_.reserve(threads_max_);
    try {
        while (threads_.size() < threads_max_) threads_.emplace_back([this] { run(); });
    } catch (const std::system_error&) {
    }
    return !threads_.empty();
}

bool Copier::copy_now(uint64_t space, const std::string_view* keys, unsigned char* const* to, size_t count,
                      uint64_t block_bytes) {
    uint64_t round;
    {
        std::lock_guard lock(mutex_);
        if (ended_) return false;
        round = one_more();
    }
    bool good = true;
    for (size_t i = 0; count > 1 && good && i < count; ++i) good = reader_.has(space, keys[i], block_bytes);
    const bool away = count * block_bytes >= kAwayBytes;
    for (size_t i = count; good && i-- > 0;) good = reader_.copy(space, keys[i], to[i], block_bytes, away);
    std::lock_guard lock(mutex_);
    one_less(round);
    return good;
}

bool Copier::copy(const Job& job, size_t index) const {
    const bool away = job.items.size() * job.block_bytes >= kAwayBytes;
    return reader_.copy(job.space, job.items[index].key, job.items[index].to, job.block_bytes, away);
}

void Copier::finished(Job& job) {
    completions_.push(std::move(job.done));
    one_less(job.round);
}

uint64_t Copier::one_more() {
    ++unfinished_[round_];
    return round_;
}

void Copier::one_less(uint64_t round) {
    const auto those = unfinished_.find(round);
    if (--those->second != 0) return;
    if (round != round_) unfinished_.erase(those);
    idle_.notify_all();
}

void Copier::call_off() {
    std::unique_lock lock(mutex_);
    give_up(lock);
}

void Copier::end() {
    std::unique_lock lock(mutex_);
    ended_ = true;
    give_up(lock);
}

void Copier::give_up(std::unique_lock<std::mutex>& lock) {
    for (const std::shared_ptr<Job>& job : jobs_) {
        job->finished += job->items.size() - job->next;
        job->next = job->items.size();
        if (job->finished == job->items.size()) finished(*job);
    }
    jobs_.clear();
    const uint64_t last = round_++;
    idle_.wait(lock, [&] {
        const auto first_later = unfinished_.upper_bound(last);
        return std::all_of(unfinished_.begin(), first_later, [](const auto& each) { return each.second == 0; });
    });
    unfinished_.erase(unfinished_.begin(), unfinished_.upper_bound(last));
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
