#include "io_engine.hpp"

#include <pthread.h>
#include <sys/epoll.h>

#include <algorithm>

namespace p2pkv {
namespace {
constexpr uint64_t kWakeJob = ~uint64_t{0};
constexpr int kEventsMax = 64;
}  // namespace

IoEngine::IoEngine(size_t transfers_max)
    : transfers_max_(transfers_max), epoll_(epoll_create1(EPOLL_CLOEXEC)), wake_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (epoll_ < 0 || wake_fd_ < 0) throw std::runtime_error("epoll or eventfd failed");
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = kWakeJob;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_fd_, &event);
    thread_ = std::thread([this] { run(); });
}

IoEngine::~IoEngine() {
    stop();
    close(epoll_);
    close(wake_fd_);
}

void IoEngine::wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof one);
}

bool IoEngine::submit(std::unique_ptr<Transfer> transfer) {
    const uint64_t job = transfer->job;
    std::lock_guard lock(mutex_);
    if (stopping_ || job == kWakeJob || entries_.size() >= transfers_max_) return false;
    const int fd = transfer->fd;
    const bool earlier = transfer->next_check() < sleeping_until_;
    auto [it, fresh] = entries_.try_emplace(job);
    if (!fresh) return false;
    it->second.transfer = std::move(transfer);
    epoll_event event{};
    event.events = EPOLLOUT;  // the first step sends something; it is the I/O thread that takes it
    event.data.u64 = job;
    it->second.armed = event.events;
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event) != 0) {
        entries_.erase(it);
        return false;
    }
    if (earlier) wake();
    return true;
}

void IoEngine::cancel(uint64_t job) {
    std::lock_guard lock(mutex_);
    const auto it = entries_.find(job);
    if (it == entries_.end()) return;
    it->second.cancelled = true;
    wake();
}

size_t IoEngine::active() const {
    std::lock_guard lock(mutex_);
    return entries_.size();
}

void IoEngine::stop() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        wake();
    }
    if (thread_.joinable()) thread_.join();
}

// Takes the entry out of every table first, so that nobody can step it again, then tells.
void IoEngine::finish(uint64_t job, Entry& entry) {
    epoll_ctl(epoll_, EPOLL_CTL_DEL, entry.transfer->fd, nullptr);
    IoEvent event;
    event.job = job;
    event.final = true;
    event.code = entry.transfer->code;
    event.detail = std::move(entry.transfer->detail);
    entry.transfer->fill_final(&event);
    {
        std::lock_guard lock(mutex_);
        entries_.erase(job);
    }
    completions_.push(std::move(event));
}

void IoEngine::step(uint64_t job) {
    Entry* entry;
    {
        std::lock_guard lock(mutex_);
        const auto it = entries_.find(job);
        if (it == entries_.end()) return;
        entry = &it->second;  // stays put: unordered_map never moves its nodes, and only this thread erases
    }
    const Transfer::Want want = entry->transfer->step();
    if (want == Transfer::Want::done) return finish(job, *entry);
    IoEvent partial;
    if (entry->transfer->take_partial(&partial)) {
        partial.job = job;
        completions_.push(std::move(partial));
    }
    const uint32_t events = want == Transfer::Want::read ? EPOLLIN : EPOLLOUT;
    if (events != entry->armed) {
        epoll_event event{};
        event.events = events;
        event.data.u64 = job;
        epoll_ctl(epoll_, EPOLL_CTL_MOD, entry->transfer->fd, &event);
        entry->armed = events;
    }
}

// Ends what is past its deadline, stalled or cancelled; returns how many milliseconds may be slept.
int IoEngine::sweep() {
    const auto now = Clock::now();
    std::vector<std::pair<uint64_t, Entry*>> ended;
    auto next = Clock::time_point::max();
    {
        std::lock_guard lock(mutex_);
        for (auto& [job, entry] : entries_) {
            Transfer& transfer = *entry.transfer;
            if (entry.cancelled || stopping_) {
                transfer.code = Code::cancelled;
            } else if (now >= transfer.limits.deadline) {
                transfer.code = Code::timeout;
            } else if (now >= transfer.last_progress + transfer.limits.stall) {
                transfer.code = Code::stalled;
            } else {
                next = std::min(next, transfer.next_check());
                continue;
            }
            ended.emplace_back(job, &entry);
        }
        sleeping_until_ = next;
    }
    for (auto& [job, entry] : ended) finish(job, *entry);
    if (next == Clock::time_point::max()) return -1;
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(next - Clock::now()).count();
    return static_cast<int>(std::clamp<int64_t>(ms + 1, 1, 60'000));
}

void IoEngine::run() {
    pthread_setname_np(pthread_self(), "p2pkv-io");
    epoll_event events[kEventsMax];
    while (true) {
        const int timeout = sweep();
        {
            std::lock_guard lock(mutex_);
            if (stopping_ && entries_.empty()) return;
        }
        const int n = epoll_wait(epoll_, events, kEventsMax, timeout);
        for (int i = 0; i < n; ++i) {
            if (events[i].data.u64 == kWakeJob) {
                uint64_t count;
                [[maybe_unused]] const ssize_t got = read(wake_fd_, &count, sizeof count);
            } else {
                step(events[i].data.u64);
            }
        }
    }
}

}  // namespace p2pkv
