#include "placement.hpp"

namespace p2pkv {
namespace {

constexpr int kMany = 4;  // an engine's thread, the lane's, the receiver's, and one to spare

// It may fail: the thread may have ended, or the administrator taken that processor away. Then it runs where it may.
void put(pid_t thread, uint32_t processor, uint32_t or_processor) {
    cpu_set_t these;
    CPU_ZERO(&these);
    CPU_SET(processor, &these);
    CPU_SET(or_processor, &these);
    if (thread != 0) sched_setaffinity(thread, sizeof these, &these);
}

}  // namespace

uint32_t current_processor() {
    const int number = sched_getcpu();
    return number < 0 || number >= static_cast<int>(kNoProcessor) ? kNoProcessor : static_cast<uint32_t>(number);
}

bool many_processors() {
    static const bool many = [] {
        cpu_set_t allowed;
        return sched_getaffinity(0, sizeof allowed, &allowed) == 0 && CPU_COUNT(&allowed) >= kMany;
    }();
    return many;
}

Placement::Placement() {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) != 2) return;
    while (!CPU_ISSET(first_, &allowed)) ++first_;
    second_ = first_ + 1;
    while (!CPU_ISSET(second_, &allowed)) ++second_;
    two_ = true;
}

void Placement::arrange(uint32_t engine, pid_t reader, pid_t checker) {
    if (!two_ || (engine != first_ && engine != second_)) return;
    std::lock_guard lock(mutex_);
    if (engine == engine_ && reader == reader_ && checker == checker_) return;
    engine_ = engine;
    reader_ = reader;
    checker_ = checker;
    const uint32_t other = engine == first_ ? second_ : first_;
    put(reader, other, other);
    put(checker, engine, engine);
}

void Placement::give_up() {
    std::lock_guard lock(mutex_);
    if (engine_ == kNoProcessor) return;
    put(reader_, first_, second_);
    put(checker_, first_, second_);
    engine_ = kNoProcessor;
}

}  // namespace p2pkv
