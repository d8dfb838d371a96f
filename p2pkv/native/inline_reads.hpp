// In the NIXL process: READs of the agent's native code, done without the interpreter where that is possible.
//
// It is where a read ends within its own post (CMA: the system call copies): then there is nothing to wait for, nothing to
// quarantine, and no decision to make but what to read next. NIXL itself is called through its own Python bindings'
// objects. A read that turns out otherwise (a post that does not end at once, an error, a peer that is not inline) is
// handed over, as it stands, to the engine in Python (p2pkv/transport/nixl_engine.py), which handles everything.
//
// One thread, which holds the GIL but for waiting and copying.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace p2pkv {

// What of NIXL's bindings is called, each bound to its object.
struct NixlCalls {
    nanobind::object descriptors;  // (list of (address, length, 0)) -> nixlXferDList
    nanobind::object create;       // (local, remote, peer) -> handle
    nanobind::object post;         // (handle) -> nixl_status_t
    nanobind::object release;      // (handle)
};

class InlineReads {
  public:
    // `fd`: the second socket to the agent, not blocking. `bell`: the agent's eventfd, rung after what is sent, since that is
    // where it sleeps: a socket's wake-up asks the scheduler to put the woken thread on the waker's processor, behind the
    // next piece of the copy that it is to be told of. Both stay the caller's. `base`: our mapping of the arena.
    InlineReads(int fd, int bell, NixlCalls calls, uintptr_t base, uint64_t bytes);
    InlineReads(const InlineReads&) = delete;
    InlineReads& operator=(const InlineReads&) = delete;

    // READs from this peer may be done here: `base` is its address of its arena.
    void add_peer(std::string name, uint64_t base, uint64_t bytes);
    void remove_peer(const std::string& name);

    // Wait at most so long for requests, here or on `other_fd` (`other_full`: or for room in it), then do at most so many
    // pieces of reads. Returns whether `other_fd` has something, and reads for the engine to go on with: (id, body of the
    // READ, bytes that have landed, handle of the piece that flies or failed or None, its bytes, exception or None).
    // Throws std::runtime_error: the agent is gone ("closed"), or does not keep to the protocol.
    nanobind::tuple serve(double seconds, int other_fd, bool other_full, int pieces);
    // Queue a frame of the engine's about a read of this socket.
    void send(std::string frame);

    uint64_t reads() const { return reads_; }
    uint64_t bytes_read() const { return bytes_read_; }

  private:
    struct Peer {
        uint64_t base, bytes;
    };
    struct Run {
        uint64_t remote, local, length;
    };
    struct Place {
        size_t run = 0;       // to be read next
        uint64_t offset = 0;  // in it
        uint64_t done = 0;    // bytes before
    };
    // A part of a read that NIXL has been told of.
    struct Piece {
        nanobind::object handle;
        Place end;
    };
    struct Read {
        uint32_t id;
        std::string body;
        std::string peer;
        std::vector<Run> runs;
        uint64_t piece_bytes = 0;
        double deadline = 0;
        uint64_t total = 0;
        Place at;                            // what is before it has landed
        std::deque<Piece> prepared;          // the pieces behind it, not posted yet
        std::vector<nanobind::object> used;  // handles of pieces that have landed
    };
    using ReadRef = std::unique_ptr<Read>;

    void receive(nanobind::list* handed_over);
    ReadRef parse(uint32_t id, std::string_view body) const;
    void step(nanobind::list* handed_over);
    static uint64_t room(const Read& read, const Place& at);
    Place cut(const Read& read, Place at, nanobind::list* local, nanobind::list* remote) const;
    nanobind::object prepare(Read& read);
    void release(Read& read);
    void hand_over(Read& read, nanobind::object handle, uint64_t length, nanobind::object error, nanobind::list* handed_over);
    void tell_progress(Read& read);
    void tell_done(Read& read, uint64_t status);
    void flush();
    void ring();

    const int fd_;
    const int bell_;
    const NixlCalls calls_;
    const uintptr_t base_;
    const uint64_t bytes_;
    std::map<std::string, Peer, std::less<>> peers_;
    std::deque<ReadRef> active_;
    std::string in_, out_;
    uint64_t reads_ = 0, bytes_read_ = 0;
};

}  // namespace p2pkv
