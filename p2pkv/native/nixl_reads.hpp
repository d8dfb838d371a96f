// One-sided reads for the engines' short way: the agent's own end of a second socket to its NIXL process.
//
// The NIXL process (p2pkv/transport/nixl_worker.py) takes READ here, and answers READ_PROGRESS, READ_DONE and
// QUARANTINE_CLEAR, as it does on the socket that Python has; ids from kFirstId on are this one's. A thread of its own
// checksums what has landed while the rest flies, and tells whoever submitted the read, in the words of IoEvent. It sleeps
// on an eventfd that the process rings, not on the socket (why: inline_reads.hpp).
//
// Python starts and supervises the process and connects it to peers; it says here which peers can be read (`set_peer`),
// which process there is (`attach`), and when a process that died has been reaped (`detach`): only then can nothing that
// it had begun land any more. Reads end by their deadline whatever the process does. What may still be written after that
// is named by the read's token until it is clear; Python is told of it too, because it bounds how much that may be.
#pragma once
#include <atomic>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "completions.hpp"
#include "placement.hpp"
#include "store.hpp"
#include "transfer.hpp"

namespace p2pkv {

// One READ. Blocks are landed and proven in their order.
struct NixlRead {
    uint64_t node = 0;
    PinAnswer from;                        // where they are, and what; those that are not there are skipped
    std::vector<uint64_t> offsets;         // where they go in our arena
    std::vector<uint32_t> lengths;
    double deadline = 0;                   // CLOCK_MONOTONIC, seconds
    uint32_t processor = kNoProcessor;     // where the engine waits that asked for it
    std::function<void(IoEvent)> on_event;  // on the thread of NixlReads, or of who calls submit
};

// For Python. hold: bytes of a read that has ended may still be written. clear: not any more. late: a read had to be ended
// here, the process may hang. lost: the connection to a peer (`id` is the node). broken: the socket has ended, by itself
// or because of what came: the process is of no use here any more. not_inline: a read from a peer (`id` is the node) did not
// end within its posts; the connection is as good as before.
struct NixlReadsEvent {
    enum class Kind : int { hold = 0, clear = 1, late = 2, lost = 3, broken = 4, not_inline = 5 };
    Kind kind;
    uint64_t id;
    uint64_t bytes = 0;
};

class NixlReads {
  public:
    static constexpr uint32_t kFirstId = uint32_t{1} << 31;  // FAST_ID_MIN of p2pkv/transport/nixl_wire.py

    // `partial_bytes`: finished blocks are told each time so many bytes have come.
    NixlReads(store::Store& store, uintptr_t arena, uint64_t partial_bytes);
    ~NixlReads();
    NixlReads(const NixlReads&) = delete;
    NixlReads& operator=(const NixlReads&) = delete;

    // ---- for Python
    int fd() const { return events_.fd(); }
    std::vector<NixlReadsEvent> drain() { return events_.drain(); }
    int bell() const { return bell_; }  // for the process: it writes there after what it has sent
    void attach(int fd, pid_t process);  // takes a connected, non-blocking socket over
    void detach();        // the process has been reaped: reads fail, and what was held is clear
    // Whether a node is to be read one-sided: if so, native code never reads it in another way, connected or not.
    void want(uint64_t node, bool wanted);
    void set_peer(uint64_t node, std::string endpoint);
    void drop_peer(uint64_t node);
    void stop();

    // ---- for the lane
    bool reads_from(uint64_t node) const;
    enum class Way { tcp, one_sided, not_now };  // not_now: Python has to connect the processes first
    Way way_to(uint64_t node) const;
    // False: it cannot be begun now (the process is not there, or is not connected to that endpoint); nothing happened.
    bool submit(NixlRead read);

    std::atomic<uint64_t> reads{0}, bytes_read{0};

  private:
    struct Socket;
    struct Active;
    using SocketRef = std::shared_ptr<Socket>;
    using ActiveRef = std::shared_ptr<Active>;

    void run();
    void adopt();
    void receive();
    bool on_frame(unsigned char type, uint32_t id, std::string_view body);
    bool on_done(uint32_t id, std::string_view body);
    void land(Active& read, uint64_t done_bytes);
    void tell_ahead(Active& read, uint64_t done_bytes);
    void finish(const ActiveRef& read, Code code, bool open, const char* why);
    void end_late(double now);
    void on_broken(const char* why);
    void end_reads(const char* why);
    void clear(uint32_t id);
    void clear_all();
    ActiveRef take(uint32_t id);
    double next_deadline() const;
    void wake();

    store::Store& store_;
    const uintptr_t arena_;
    const uint64_t partial_bytes_;
    const int epoll_;
    const int wake_fd_;
    const int bell_;

    std::mutex sending_;
    mutable std::mutex mutex_;  // guards what follows
    SocketRef socket_;
    int offered_ = -1;          // attach()ed, and not yet taken up by the thread
    pid_t process_ = 0;         // whose it is
    bool reaped_ = false;       // detach()ed, likewise
    bool stopping_ = false;
    std::unordered_set<uint64_t> wanted_;
    std::unordered_map<uint64_t, std::string> peers_;
    std::map<uint32_t, ActiveRef> active_;
    uint32_t next_id_ = kFirstId;

    std::atomic<double> look_until_{0};
    std::atomic<pid_t> checker_{0};  // the thread's id
    Placement placement_;

    // The thread's own.
    std::unordered_map<uint32_t, uint64_t> held_;  // ended reads that may still write -> bytes
    std::string in_;
    Completions<NixlReadsEvent> events_;
    std::thread thread_;
};

}  // namespace p2pkv
