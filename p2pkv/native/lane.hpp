// The engines' short way: GET answered without Python where that is possible.
//
// Each engine has, beside its control connection, a socket for GET, GOT and RELEASE only. One thread reads these
// sockets; what is in the local store is held and answered at once, and what one peer has is received straight into
// reserved slots by the I/O thread, or read into them by the NIXL process, proven, committed and answered from there.
// Everything that needs thought (no connection yet, several holders, a failure, a refusal) is handed to Python with what
// is left to do.
//
// Threads: the lane's own, the receiving I/O thread and that of NixlReads (`on_event`), and Python's loop (public methods). An engine's socket
// is written to under its connection's mutex, by any of them.
#pragma once
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "../index/core/lookup.hpp"
#include "completions.hpp"
#include "io_engine.hpp"
#include "neighbours.hpp"
#include "nixl_reads.hpp"
#include "placement.hpp"
#include "pool.hpp"
#include "store.hpp"

namespace p2pkv {

constexpr unsigned char kUnsettled = 255;  // the status of a key that nothing has been said about yet

struct LaneEvent {
    // rest: a GET that Python has to go on with. landed: a pull of the lane's has ended (some of it may have failed).
    // gone: an engine's socket has ended, or it broke the protocol (`detail` says how).
    enum class Kind : int { rest = 0, landed = 1, gone = 2 };
    Kind kind = Kind::rest;
    uint64_t connection = 0;
    uint32_t request_id = 0;
    uint64_t space = 0;
    std::vector<std::string> keys;  // rest: all of the GET's. landed: those that somebody watches
    std::vector<unsigned char> statuses;  // per key. rest: kUnsettled, or how the lane's own attempt at it failed
    std::vector<unsigned char> settled;   // rest: 1 where the engine has had its answer
    double asked_at = 0, deadline = 0;    // CLOCK_MONOTONIC, seconds
    std::vector<std::string> rejected_keys;  // landed: those whose bytes failed their checksum
    uint64_t node = 0;                    // whom the lane had asked; 0 = nobody
    Code code = Code::ok;                 // how that ended
    bool final = false;  // landed: the pull is over, and the figures are its; else blocks have come that are watched
    uint64_t blocks = 0, failed = 0, rejected = 0, missed = 0, bytes = 0;  // landed; rejected and missed: of `failed`
    double waited_s = 0, took_s = 0;      // landed: until the first byte (0 = none came), and in all
    std::string detail;
};

struct LaneOptions {
    uintptr_t arena = 0;
    double lease_ttl_s = 10;
    double stall_s = 0.5;
    uint64_t stream_bytes = 8 << 20;  // a pull uses a connection for each so many bytes,
    uint32_t streams = 4;             // at most so many
    uint64_t partial_bytes = 2 << 20;  // blocks are given to the engine each time so many bytes have come
    uint64_t ahead_bytes = 1 << 20;    // and it is told of parts of a block that are so long, to copy ahead; 0: never
    uint64_t one_sided_min = 0;        // less than so many bytes are sent, not read one-sided: one round trip, and no other process
    uint64_t neighbour_max = 0;        // up to so many bytes that a neighbour has are read out of its memory; 0: never
    uint64_t spread_bytes = 8 << 20;   // so many bytes that several holders have are Python's to spread over them
    uint32_t in_flight_max = 256;      // per engine
};

class Lane {
  public:
    // `nixl`: for peers that are read one-sided; null: none is. Stopped with the lane.
    Lane(store::Store& store, IoEngine& receiver, Pool& pool, NixlReads* nixl, const index::Lookup& lookup,
         LaneOptions options);
    ~Lane();

    int fd() const { return events_.fd(); }
    std::vector<LaneEvent> drain();

    // Takes a connected, non-blocking socket over. `holder`: whom leases belong to.
    void add(uint64_t connection, int fd, uint64_t holder);
    // The engine has opened this namespace (salt: see p2pkv.types.namespace_salt); GETs for others go to Python.
    void allow(uint64_t connection, uint64_t space, uint64_t salt);
    // A frame of Python's to the engine. False: the connection has gone.
    bool send(uint64_t connection, std::string frame);
    void close(uint64_t connection);

    // Whether the lane is pulling this block now; if so, the event of its end names the key.
    bool watch(uint64_t space, const std::string& key);
    // Whether GETs of this block are Python's, who knows which holder of it sent something else (at most kDistrustedMax).
    void distrust(uint64_t space, const std::string& key, bool distrusted);
    // Agents of this host that are read by their directories, where they would be read one-sided.
    Neighbours neighbours;
    void set_draining(bool draining) { draining_ = draining; }
    // No pull ends after this returns; all sockets are closed.
    void stop();

    size_t in_flight() const;         // pulls
    size_t blocks_in_flight() const;
    std::atomic<uint64_t> hits_local{0}, bytes_local{0}, hits_peer{0}, bytes_peer{0}, hits_neighbour{0}, misses{0},
        handed_over{0};

  private:
    struct Connection;
    struct Request;
    struct Pull;
    struct Wanted;
    using ConnectionRef = std::shared_ptr<Connection>;

    void run();
    void on_readable(const ConnectionRef& connection);
    bool on_frames(const ConnectionRef& connection);
    static bool parse_get(Request& request);
    void on_get(const std::shared_ptr<Request>& request);
    bool on_release(const ConnectionRef& connection, std::string_view body);
    bool nobody_has(const Request& request, const std::vector<uint32_t>& missing);
    bool start_pull(const std::shared_ptr<Request>& request);
    bool look_up(const Request& request, Wanted* out);
    bool read_neighbour(const std::shared_ptr<Request>& request, const Wanted& wanted);
    bool plan(const std::shared_ptr<Request>& request, const Wanted& wanted, std::vector<std::shared_ptr<Pull>>* pulls);
    bool take_off(const Request& request, const std::vector<uint32_t>& indices);
    void call_off(const Request& request, const std::vector<uint32_t>& indices);
    bool has_events() const;
    void settle_down(const Pull& pull);
    void submit(const std::shared_ptr<Pull>& pull);
    void on_pinned(const std::shared_ptr<Pull>& pull, PinAnswer answer, double asked_at, IoEvent event);
    void on_event(Pull& pull, IoEvent event);
    void send_ahead(Pull& pull, const IoEvent& event);
    void settle_blocks(Pull& pull, const IoEvent& event, LaneEvent* landed);
    void on_end(Pull& pull, IoEvent event, LaneEvent landed);
    void release_soon(const Pull& pull);
    void release_due(double now);
    void hand_over(Request& request, uint64_t node, Code code);
    void send_got(Request& request, const store::Pinned& pinned, const std::vector<uint32_t>& indices,
                  unsigned char source, unsigned char if_gone, bool more);
    void send_frame(Connection& connection, std::string frame);
    void flush(const ConnectionRef& connection);
    void end(const ConnectionRef& connection, std::string why);
    ConnectionRef find(uint64_t id);

    store::Store& store_;
    IoEngine& receiver_;
    Pool& pool_;
    NixlReads* const nixl_;
    const index::Lookup lookup_;
    const LaneOptions options_;
    const int epoll_;
    const int wake_fd_;
    std::atomic<bool> draining_{false};
    std::atomic<bool> stopping_{false};
    std::atomic<uint64_t> next_job_;
    mutable std::mutex mutex_;  // guards the four tables; never held across a system call
    std::unordered_map<uint64_t, ConnectionRef> connections_;
    std::unordered_map<std::string, bool> flights_;  // namespace and key of every block being pulled -> watched
    std::unordered_set<uint64_t> pulls_;             // jobs at the receiver
    std::unordered_set<std::string> distrusted_;
    struct Owed {
        uint64_t node;
        int fd;
        double due;
    };
    Placement placement_;
    std::deque<Owed> owed_;  // the lane's thread only
    Completions<LaneEvent> events_;
    std::thread thread_;
};

}  // namespace p2pkv
