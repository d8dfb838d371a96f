// On which processors the stages of a read run, where there are only two.
//
// A one-sided read is a pipeline: the NIXL process copies into the arena, our thread checksums what has landed, the engine
// copies it out. With a processor to spare the scheduler spreads that by itself. With two it does not: the reading process
// is woken on the processor that the engine has just left, and the engine, at the first news, on the one it was on before:
// in front of the reading process, while the other processor has half of the work. So the reader gets the other processor,
// and the thread that takes turns with the engine the engine's own. A read over TCP from an agent of this host is one as
// well: the lane's thread takes turns with the engine, and the owner's thread that sends has the other processor.
#pragma once
#include <sched.h>
#include <sys/types.h>

#include <cstdint>
#include <mutex>

namespace p2pkv {

// Of less the first news are the last, and there is nothing to do side by side: whoever is woken is better woken here.
constexpr uint64_t kWorthArranging = 512 << 10;

constexpr uint32_t kNoProcessor = 0xFFFF;  // NO_PROCESSOR of p2pkv/wire/limits.py

uint32_t current_processor();  // where the calling thread runs

// Whether this process may use four processors or more: then one that is awake is worth more than one that is free.
bool many_processors();

// Thread-safe.
class Placement {
  public:
    Placement();  // what this process may run on now

    // An engine that waits on processor `engine` is about to be served by these two threads (ids as of gettid; 0: none).
    // Does nothing where this process may use more than two processors or one, not `engine`'s, or none was told.
    void arrange(uint32_t engine, pid_t reader, pid_t checker);

    // The threads that were arranged last run where they may again.
    void give_up();

  private:
    std::mutex mutex_;
    bool two_ = false;
    uint32_t first_ = 0, second_ = 0;
    uint32_t engine_ = kNoProcessor;  // arranged for last,
    pid_t reader_ = 0, checker_ = 0;  // with these
};

}  // namespace p2pkv
