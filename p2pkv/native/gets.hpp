// An engine's GETs: the client's end of the short way (lane.hpp is the agent's).
//
// A socket for GET, GOT, AHEAD and RELEASE only, shared by threads without a thread of its own. Whoever waits for an answer
// reads the socket for everybody: the first waiter sleeps on it with the mutex released, hands each frame to whom it
// belongs, and passes that on when its own answer is there. Blocks are copied out of the agent's arena by the thread that
// asked for them, between GOT, which says that they are held, and RELEASE, which gives them back. A small get does without
// both where there is a directory: GOT says that they are there, and they are read as any block that is.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "directory_reader.hpp"

namespace p2pkv {

class Gets {
  public:
    struct Ask {
        uint64_t space = 0;
        std::vector<std::string_view> keys;
        std::vector<unsigned char*> buffers;  // one per key,
        uint64_t block_bytes = 0;             // each of so many bytes
        uint64_t deadline_ms = 0;             // what the agent is told,
        double deadline = 0;                  // and until when we wait: CLOCK_MONOTONIC, seconds
        bool unleased = false;                // blocks need not be held for us: they are read by the directory
    };
    enum class End : int {
        done = 0,
        late = 1,         // no answer, or not all of it, by the deadline
        broken = 2,       // the socket has ended, or what came on it is no answer (`detail`: why)
        busy = 3,         // too much is unanswered, or the agent does not read: nothing was sent
        refused = 4,      // ERROR (`detail`: its body)
        nonsense = 5,     // an answer to something that nobody asked (`detail`)
        interrupted = 6,  // by `interrupted`
    };
    struct Result {
        End end = End::done;
        std::vector<unsigned char> statuses;  // p2pkv.types.Status, per key; a buffer counts only where it is OK
        std::string detail;
        std::vector<size_t> gone;  // were there, unleased, and are not any more: to be asked for again
    };

    // Takes a connected socket over. The arena stays the caller's, and so does the directory (null: everything is asked
    // for); both have to outlive this. `look_s`: who waits looks for so long before it sleeps, each time.
    Gets(int fd, const void* arena, size_t arena_bytes, const DirectoryReader* directory = nullptr,
         double look_s = looks_here());
    // What pays here: to sleep and be woken takes 50 us on a virtual machine, but with few processors whoever looks keeps
    // one from those that it waits for.
    static double looks_here();
    ~Gets();
    Gets(const Gets&) = delete;
    Gets& operator=(const Gets&) = delete;

    // Thread-safe. The buffers are written to by the calling thread only, so never after the return. `interrupted` is asked
    // after a signal and every kSignalsS, without a mutex held: whether to give up.
    Result get(const Ask& ask, const std::function<bool()>& interrupted);
    // Every waiter's get is broken now, and each later one. Thread-safe.
    void close(std::string reason);
    std::optional<std::string> broken() const;
    // Whether the agent is still there, as far as was seen lately: looks at the socket now and then, so that who never asks
    // finds out, too, and does not go on with the memory of an agent that has gone.
    bool lives();

  private:
    // `meanwhile`: called once the agent has been asked.
    Result ask(const Ask& ask, const std::function<bool()>& interrupted, const std::function<void()>& meanwhile);

    struct Part {
        unsigned char type;
        std::string body;
    };
    using Parts = std::deque<Part>;
    struct Copied {
        uint64_t offset = 0, done = 0;  // so many bytes of the block, from there
    };
    struct Got;
    struct Ahead;
    class Turn;

    End begin(Parts* inbox, uint32_t* id);
    End next(Parts* inbox, double deadline, const std::function<bool()>& interrupted, Part* part);
    bool read_once(double seconds, Parts* unwanted);
    void dispatch(std::string_view data, Parts* unwanted);
    void fail(std::string reason);  // mutex_ is held
    End send(std::string_view frame, double deadline, const std::function<bool()>& interrupted);
    End release(uint64_t lease);
    void discard(const Parts& parts);

    static bool parse(std::string_view body, Got* got);
    static bool parse(std::string_view body, Ahead* ahead);
    std::string complaint(const Ask& ask, const Got& got) const;
    std::string complaint(const Ask& ask, const Ahead& ahead) const;
    void copy_ahead(const Ask& ask, const Ahead& ahead, std::vector<Copied>* copied) const;
    void copy_out(const Ask& ask, const Got& got, const std::vector<Copied>& copied, Result* out) const;
    void copy_unleased(const Ask& ask, const Got& got, Result* out) const;

    const int fd_;
    const unsigned char* const arena_;
    const size_t arena_bytes_;
    const DirectoryReader* const directory_;
    const double look_s_;
    std::atomic<double> looked_at_{0};
    std::atomic<bool> ended_{false};  // broken_ is there
    std::timed_mutex send_mutex_;
    mutable std::mutex mutex_;  // guards what follows
    std::condition_variable arrived_;
    bool reading_ = false;
    std::optional<std::string> broken_;
    uint32_t last_id_ = 0;
    std::unordered_map<uint32_t, Parts*> inboxes_;
    std::string in_;  // of who reads
};

}  // namespace p2pkv
