// The owner's half of the TCP transport: GET -> pin -> send, on one thread with one epoll set, without Python. And PIN,
// for readers that fetch the bytes themselves, one-sided, over NIXL.
//
// A connection carries one request at a time. Zero-copy sends keep references to the arena's pages in the socket queue,
// so "sent" does not mean "read": the lease of an answer is held until the reader's RELEASE, its next GET, the
// connection's end or the lease's expiry, whichever comes first. An answer that is not all in the socket when its lease
// expires is cut off: the rest could be another block's bytes.
#pragma once
#include <sys/epoll.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "allowance.hpp"
#include "completions.hpp"
#include "placement.hpp"
#include "requests.hpp"
#include "store.hpp"
#include "transfer.hpp"

namespace p2pkv {

// For the log: what a reader did that the protocol does not allow.
struct ServerEvent {
    uint64_t node;
    std::string text;
};

// Read by any thread at any time.
struct ServerCounters {
    std::atomic<uint64_t> bytes_served{0};         // payload bytes that went into sockets
    std::atomic<uint64_t> blocks_served{0};        // blocks of answers that went out whole
    std::atomic<uint64_t> gets{0};
    std::atomic<uint64_t> pins{0};
    std::atomic<uint64_t> refused{0};              // of both, answered "busy" for the reader's own sake
    std::atomic<uint64_t> protocol_errors{0};
    std::atomic<uint64_t> cut_off{0};              // answers whose lease expired before they were sent
    std::atomic<uint64_t> connections_refused{0};  // over the bound
    std::atomic<uint64_t> leases_given{0};
    std::atomic<uint64_t> leases_held{0};          // now
};

class Server {
  public:
    // `file` and `mapping` are the arena's, valid until stop() has returned; so is the store.
    // `bytes_per_s`: of answers, by this server and whoever asks may_send(); beyond that readers are told "busy". 0: any.
    Server(store::Store* store, int file, const unsigned char* mapping, double lease_ttl_s, size_t connections_max,
           double bytes_per_s = 0);
    ~Server();

    // Serve a connected, non-blocking socket that `node` has introduced itself on; owns it from here on. `leftover`:
    // what was read from it already. False: stopped or full, and the socket is closed.
    bool add(int fd, uint64_t node, bool same_host, std::string leftover);

    // The NIXL agent that readers have to be connected to, as PINNED names it; "": there is none now.
    void set_endpoint(std::string name);

    // Whether so many bytes may be read from here now, in whatever way; they are counted if so.
    bool may_send(uint64_t bytes);

    // Close every connection, give every lease back, join the thread.
    void stop();

    int fd() const { return events_.fd(); }  // readable when drain() has something
    std::vector<ServerEvent> drain();
    size_t active() const { return active_; }
    const ServerCounters& counters() const { return counters_; }

  private:
    struct Connection {
        Connection(int fd, uint64_t node, const unsigned char* mapping) : fd(fd), node(node), mapping(mapping) {}
        const int fd;
        const uint64_t node;
        const unsigned char* const mapping;  // not null: copy out of it, the reader is on this host
        uint32_t armed = EPOLLIN;
        Inbox inbox;
        std::optional<Send> answer;  // on its way
        uint32_t answer_blocks = 0;
        uint64_t lease = 0;
        double ends_at = std::numeric_limits<double>::infinity();  // the lease, or the wait for room for an answer
    };
    struct Incoming {
        int fd;
        uint64_t node;
        bool same_host;
        std::string leftover;
    };

    enum class Next { read, write, end, cut };  // what a connection waits for, or how it is over

    void run();
    void take_incoming();
    void sweep();
    void end_all();
    void turn(uint64_t id, Connection& connection, std::string_view bytes);
    Next go_on(Connection& connection, std::string_view bytes);
    Next serve(Connection& connection, unsigned char type, std::string_view body);
    void make_way(uint64_t bytes);
    void answer_get(Connection& connection);
    void answer_pin(Connection& connection, bool serve_reads);
    bool hold(Connection& connection, store::Pinned* pinned);
    bool afford(Connection& connection, const store::Pinned& pinned);
    void send_answer(Connection& connection, std::string header, std::vector<FileRun> runs, uint32_t blocks = 0);
    std::string endpoint();
    void count_answer(Connection& connection, bool whole);
    Next reject(Connection& connection, const char* why);
    void release(Connection& connection);
    bool arm(uint64_t id, Connection& connection, uint32_t events);
    void end(uint64_t id, Connection& connection, bool abruptly);
    void tell(uint64_t node, const char* text) noexcept;
    void wake();

    store::Store* const store_;
    const int file_;
    const unsigned char* const mapping_;
    const double lease_ttl_s_;
    const size_t connections_max_;
    Allowance allowance_;
    const int epoll_;
    const int wake_fd_;
    std::atomic<size_t> active_{0};
    std::atomic<size_t> unread_{0};  // events nobody has drained yet
    std::atomic<bool> stopping_{false};
    ServerCounters counters_;
    Completions<ServerEvent> events_;
    std::mutex mutex_;  // guards the following two
    std::vector<Incoming> incoming_;
    std::string endpoint_;

    // The rest is the thread's own.
    std::unordered_map<uint64_t, Connection> connections_;
    uint64_t last_id_ = 0;
    double check_at_ = std::numeric_limits<double>::infinity();  // nothing ends by itself before
    BlocksRequest asked_;
    Placement placement_;
    std::unique_ptr<char[]> received_;
    std::thread thread_;
};

}  // namespace p2pkv
