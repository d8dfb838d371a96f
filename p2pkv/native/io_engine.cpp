#include "io_engine.hpp"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>

#include <algorithm>

namespace p2pkv {
namespace {
constexpr uint64_t kWakeJob = ~uint64_t{0};
constexpr uint64_t kTimerJob = kWakeJob - 1;
constexpr int kEventsMax = 64;

void watch(int epoll, int fd, uint64_t job) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = job;
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}
}  // namespace

IoEngine::IoEngine(size_t transfers_max)
    : transfers_max_(transfers_max),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wake_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      timer_fd_(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)) {
    if (epoll_ < 0 || wake_fd_ < 0 || timer_fd_ < 0) throw std::runtime_error("epoll, eventfd or timerfd failed");
    watch(epoll_, wake_fd_, kWakeJob);
    watch(epoll_, timer_fd_, kTimerJob);
    thread_ = std::thread([this] { run(); });
}

IoEngine::~IoEngine() {
    stop();
    close(epoll_);
    close(wake_fd_);
    close(timer_fd_);
}

void IoEngine::wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof one);
}

// Call with the mutex held. steady_clock is CLOCK_MONOTONIC here, so its times can be given to the kernel.
void IoEngine::arm_timer(Clock::time_point when) {
    timer_at_ = when;
    itimerspec spec{};
    if (when != Clock::time_point::max()) {
        const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(when.time_since_epoch()).count();
        spec.it_value.tv_sec = ns / 1'000'000'000;
        spec.it_value.tv_nsec = std::max<long>(1, ns % 1'000'000'000);
    }
    timerfd_settime(timer_fd_, TFD_TIMER_ABSTIME, &spec, nullptr);
}

bool IoEngine::submit(std::unique_ptr<Transfer> transfer) {
    const uint64_t job = transfer->job;
    const int fd = transfer->fd;
    {
        std::lock_guard lock(mutex_);
        if (stopping_ || job >= kTimerJob || entries_.size() >= transfers_max_ || entries_.contains(job)) return false;
    }
    const Transfer::Want want = transfer->begin();  // outside the lock: it may copy, and others have transfers to step
    if (want == Transfer::Want::done) {
        report(*transfer);
        return true;
    }
    std::lock_guard lock(mutex_);
    if (stopping_) {
        transfer->code = Code::cancelled;
        report(*transfer);
        return true;
    }
    Entry& entry = entries_[job];
    entry.transfer = std::move(transfer);
    entry.armed = want == Transfer::Want::read ? EPOLLIN : EPOLLOUT;
    epoll_event event{};
    event.events = entry.armed;
    event.data.u64 = job;
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event) != 0) {
        entry.transfer->code = Code::closed;
        entry.transfer->detail = "the socket cannot be watched";
        report(*entry.transfer);
        entries_.erase(job);
        return true;
    }
    if (entry.transfer->next_check() < timer_at_) arm_timer(entry.transfer->next_check());
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

void IoEngine::report(Transfer& transfer) {
    IoEvent event;
    event.job = transfer.job;
    event.final = true;
    event.code = transfer.code;
    event.detail = std::move(transfer.detail);
    transfer.fill_final(&event);
    if (transfer.on_event) return transfer.on_event(std::move(event));
    completions_.push(std::move(event));
}

// Takes the entry out of every table first, so that nobody can step it again, then tells.
void IoEngine::finish(uint64_t job, Entry& entry) {
    epoll_ctl(epoll_, EPOLL_CTL_DEL, entry.transfer->fd, nullptr);
    const std::unique_ptr<Transfer> transfer = std::move(entry.transfer);
    {
        std::lock_guard lock(mutex_);
        entries_.erase(job);
    }
    report(*transfer);
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
    if (entry->transfer->on_event) {
        entry->transfer->tell_news();
    } else if (entry->transfer->take_partial(&partial)) {
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

// Ends what is past its deadline, stalled or cancelled, and sets the timer for the next.
void IoEngine::sweep() {
    const auto now = Clock::now();
    std::vector<std::pair<uint64_t, Entry*>> ended;
    {
        std::lock_guard lock(mutex_);
        auto next = Clock::time_point::max();
        for (auto& [job, entry] : entries_) {
            Transfer& transfer = *entry.transfer;
            if (entry.cancelled || stopping_) {
                transfer.code = Code::cancelled;
            } else if (now >= transfer.limits.deadline) {
                transfer.code = Code::timeout;
            } else if (now >= transfer.stalls_at()) {
                transfer.code = Code::stalled;
            } else {
                next = std::min(next, transfer.next_check());
                continue;
            }
            ended.emplace_back(job, &entry);
        }
        arm_timer(next);
    }
    for (auto& [job, entry] : ended) finish(job, *entry);
}

void IoEngine::run() {
    pthread_setname_np(pthread_self(), "p2pkv-io");
    epoll_event events[kEventsMax];
    while (true) {
        const int n = epoll_wait(epoll_, events, kEventsMax, -1);
        bool look = false;
        for (int i = 0; i < n; ++i) {
            const uint64_t job = events[i].data.u64;
            if (job < kTimerJob) {
                step(job);
                continue;
            }
            uint64_t count;
            [[maybe_unused]] const ssize_t got = read(job == kWakeJob ? wake_fd_ : timer_fd_, &count, sizeof count);
            look = true;
        }
        if (!look) continue;
        sweep();
        std::lock_guard lock(mutex_);
        if (stopping_ && entries_.empty()) return;
    }
}

}  // namespace p2pkv
