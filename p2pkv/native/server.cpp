#include "server.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "frame.hpp"

namespace p2pkv {
namespace {

constexpr unsigned char kMiss = 1;  // p2pkv.types.Status
constexpr size_t kReceiveBytes = 64 << 10;
constexpr uint64_t kTurnBytes = 4 << 20;  // then another connection gets its turn
constexpr size_t kEventsUnreadMax = 256;  // a peer that reconnects to be wrong again must not fill memory
constexpr int kEventsMax = 64;
constexpr uint64_t kWakeId = 0;
constexpr double kNever = std::numeric_limits<double>::infinity();

double seconds_now() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

void store32(char* at, uint32_t value) { std::memcpy(at, &value, sizeof value); }
void store64(char* at, uint64_t value) { std::memcpy(at, &value, sizeof value); }

// What GOT's and PINNED's records begin with.
void write_record(char* record, const store::Place& place) {
    record[0] = static_cast<char>(place.hit ? kOk : kMiss);
    if (!place.hit) return;
    store32(record + 4, static_cast<uint32_t>(place.length));
    store64(record + 8, place.generation);
    std::memcpy(record + 16, place.checksum.data(), place.checksum.size());
}

uint64_t bytes_of(const store::Pinned& pinned) {
    uint64_t bytes = 0;
    for (const store::Place& place : pinned.places) bytes += place.hit ? place.length : 0;
    return bytes;
}

// For epoll_wait: rounded up, so that what is due is due when it returns.
int milliseconds_until(double when, double now) {
    if (when == kNever) return -1;
    return static_cast<int>(std::clamp(std::ceil((when - now) * 1e3), 0.0, 60'000.0));
}

}  // namespace

Server::Server(store::Store* store, int file, const unsigned char* mapping, double lease_ttl_s, size_t connections_max,
               double bytes_per_s)
    : store_(store),
      file_(file),
      mapping_(mapping),
      lease_ttl_s_(lease_ttl_s),
      connections_max_(connections_max),
      allowance_(bytes_per_s),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wake_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      received_(std::make_unique<char[]>(kReceiveBytes)) {
    if (epoll_ < 0 || wake_fd_ < 0) throw std::runtime_error("epoll or eventfd failed");
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = kWakeId;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_fd_, &event);
    thread_ = std::thread([this] { run(); });
}

Server::~Server() {
    stop();
    close(epoll_);
    close(wake_fd_);
}

void Server::wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof one);
}

bool Server::add(int fd, uint64_t node, bool same_host, std::string leftover) {
    const int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    {
        std::lock_guard lock(mutex_);
        if (!stopping_ && active_ < connections_max_) {
            ++active_;
            incoming_.push_back({fd, node, same_host, std::move(leftover)});
            wake();
            return true;
        }
    }
    close(fd);
    ++counters_.connections_refused;
    return false;
}

void Server::stop() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        wake();
    }
    if (thread_.joinable()) thread_.join();
}

std::vector<ServerEvent> Server::drain() {
    unread_ = 0;
    return events_.drain();
}

void Server::tell(uint64_t node, const char* text) noexcept {
    if (unread_++ >= kEventsUnreadMax) return;
    try {
        events_.push({node, text});
    } catch (const std::exception&) {
        return;  // no memory to say it in
    }
}

void Server::run() {
    pthread_setname_np(pthread_self(), "p2pkv-serve");
    epoll_event events[kEventsMax];
    while (!stopping_) {
        const int n = epoll_wait(epoll_, events, kEventsMax, milliseconds_until(check_at_, seconds_now()));
        for (int i = 0; i < n && !stopping_; ++i) {
            const uint64_t id = events[i].data.u64;
            if (id == kWakeId) {
                uint64_t count;
                [[maybe_unused]] const ssize_t got = read(wake_fd_, &count, sizeof count);
                take_incoming();
                continue;
            }
            const auto it = connections_.find(id);
            if (it != connections_.end()) turn(id, it->second, {});
        }
        if (seconds_now() >= check_at_) sweep();
    }
    end_all();
}

void Server::take_incoming() {
    std::vector<Incoming> incoming;
    {
        std::lock_guard lock(mutex_);
        incoming.swap(incoming_);
    }
    for (Incoming& in : incoming) {
        const uint64_t id = ++last_id_;
        epoll_event event{};
        event.events = EPOLLIN;
        event.data.u64 = id;
        if (epoll_ctl(epoll_, EPOLL_CTL_ADD, in.fd, &event) != 0) {
            tell(in.node, "the socket cannot be watched");
            close(in.fd);
            --active_;
            continue;
        }
        Connection& connection =
            connections_.try_emplace(id, in.fd, in.node, in.same_host ? mapping_ : nullptr).first->second;
        if (!in.leftover.empty()) turn(id, connection, in.leftover);
    }
}

// One connection's share: at most one receive and about kTurnBytes of answers. `bytes`: instead of a receive.
void Server::turn(uint64_t id, Connection& connection, std::string_view bytes) {
    Next next;
    try {
        next = go_on(connection, bytes);
    } catch (const std::exception& error) {  // no memory for this answer, say: that is this connection's end only
        tell(connection.node, error.what());
        next = Next::end;
    }
    if (next == Next::read || next == Next::write) {
        if (arm(id, connection, next == Next::read ? EPOLLIN : EPOLLOUT)) return;
        next = Next::end;
    }
    end(id, connection, next == Next::cut);
}

Server::Next Server::go_on(Connection& connection, std::string_view bytes) {
    if (!connection.answer && connection.inbox.queued() == 0 && bytes.empty()) {
        const ssize_t n = recv(connection.fd, received_.get(), kReceiveBytes, MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return Next::read;
        if (n <= 0) return Next::end;
        bytes = {received_.get(), static_cast<size_t>(n)};
    }
    if (!bytes.empty()) {
        if (const char* wrong = connection.inbox.feed(bytes)) return reject(connection, wrong);
    }
    uint64_t sent = 0;
    while (true) {
        if (connection.answer) {
            if (seconds_now() >= connection.ends_at) return Next::cut;
            const Transfer::Want want = connection.answer->step();
            if (want == Transfer::Want::write) return Next::write;
            if (connection.answer->code != Code::ok) {
                if (connection.answer->code != Code::closed) tell(connection.node, connection.answer->detail.c_str());
                return Next::end;
            }
            IoEvent done;
            connection.answer->fill_final(&done);
            sent += done.bytes;
            count_answer(connection, true);
        }
        if (sent >= kTurnBytes && connection.inbox.queued() != 0) return Next::write;
        unsigned char type;
        std::string_view body;
        if (!connection.inbox.next(&type, &body)) return Next::read;
        const Next next = serve(connection, type, body);
        if (next != Next::read) return next;
        connection.inbox.tidy();
    }
}

// Whatever comes means that the reader is done with the last answer.
Server::Next Server::serve(Connection& connection, unsigned char type, std::string_view body) {
    release(connection);
    if (type == kTypeRelease) return parse_release(body) ? Next::read : reject(connection, "malformed RELEASE");
    if (type == kTypeGet) {
        if (!parse_get(body, &asked_)) return reject(connection, "malformed GET");
        answer_get(connection);
    } else {
        bool serve_reads;
        if (!parse_pin(body, &asked_, &serve_reads)) return reject(connection, "malformed PIN");
        answer_pin(connection, serve_reads);
    }
    return Next::read;
}

// Hold what was asked for. False: the reader may hold no more, and has been told so.
bool Server::hold(Connection& connection, store::Pinned* pinned) {
    const double ttl_s = std::min(asked_.ttl_ms / 1e3, lease_ttl_s_);
    *pinned = store_->pin(asked_.space, asked_.keys, ttl_s, seconds_now(), connection.node);
    connection.lease = pinned->lease;
    connection.ends_at = pinned->expires_at;
    counters_.leases_given += pinned->lease != 0;
    counters_.leases_held += pinned->lease != 0;
    if (pinned->lease != 0 || pinned->considered == asked_.keys.size()) return true;
    ++counters_.refused;
    send_answer(connection, error_frame("busy", "this peer holds as much as it may"), {});
    return false;
}

bool Server::may_send(uint64_t bytes) {
    if (allowance_.take(bytes)) return true;
    ++counters_.refused;
    return false;
}

// False: as much is being sent as may be. The reader has been told, and nothing is held for it.
bool Server::afford(Connection& connection, const store::Pinned& pinned) {
    const uint64_t bytes = bytes_of(pinned);
    if (bytes == 0 || may_send(bytes)) return true;
    release(connection);
    send_answer(connection, error_frame("busy", "this node sends as much as it may (transport.serve_max)"), {});
    return false;
}

// A reader of this host, whose thread receives while this one sends: on two processors, not on one. Who does not say where
// that is leaves all as it was: to be moved takes a running thread 25 us.
void Server::make_way(uint64_t bytes) {
    if (asked_.processor == kNoProcessor) return;
    if (bytes < kWorthArranging) return placement_.give_up();
    placement_.arrange(asked_.processor, gettid(), 0);
}

void Server::answer_get(Connection& connection) {
    ++counters_.gets;
    store::Pinned pinned;
    if (!hold(connection, &pinned) || !afford(connection, pinned)) return;
    if (connection.mapping != nullptr) make_way(bytes_of(pinned));
    std::string header = frame::begin(kTypeGot, pinned.places.size() * kGotRecordBytes);
    size_t at = header.size();
    header.resize(at + pinned.places.size() * kGotRecordBytes);
    std::vector<FileRun> runs;
    uint32_t blocks = 0;
    for (const store::Place& place : pinned.places) {
        write_record(header.data() + at, place);
        at += kGotRecordBytes;
        if (!place.hit) continue;
        ++blocks;
        if (!runs.empty() && runs.back().offset + runs.back().length == place.offset) {
            runs.back().length += place.length;
        } else {
            runs.push_back({place.offset, place.length});
        }
    }
    send_answer(connection, std::move(header), std::move(runs), blocks);
}

void Server::answer_pin(Connection& connection, bool serve_reads) {
    ++counters_.pins;
    const std::string endpoint = this->endpoint();
    if (serve_reads) return send_answer(connection, error_frame("unsupported", "to be served, ask on a control connection"), {});
    if (endpoint.empty()) return send_answer(connection, error_frame("busy", "the NIXL process is not running"), {});
    store::Pinned pinned;
    if (!hold(connection, &pinned) || !afford(connection, pinned)) return;
    const size_t fixed = kPinnedFixedBytes + endpoint.size();
    std::string body(fixed + pinned.places.size() * kPinnedRecordBytes, '\0');
    store32(body.data(), static_cast<uint32_t>(pinned.ttl_s * 1e3));
    store32(body.data() + 4, static_cast<uint32_t>(endpoint.size()));
    std::memcpy(body.data() + kPinnedFixedBytes, endpoint.data(), endpoint.size());
    char* record = body.data() + fixed;
    for (const store::Place& place : pinned.places) {
        write_record(record, place);
        if (place.hit) store64(record + kGotRecordBytes, place.offset);
        record += kPinnedRecordBytes;
    }
    send_answer(connection, frame::make(kTypePinned, 0, body), {});
}

void Server::send_answer(Connection& connection, std::string header, std::vector<FileRun> runs, uint32_t blocks) {
    // Without a lease nothing can go stale, but who does not read must not keep the answer for ever either.
    if (connection.lease == 0) connection.ends_at = seconds_now() + lease_ttl_s_;
    check_at_ = std::min(check_at_, connection.ends_at);
    connection.answer_blocks = blocks;
    const Limits limits{Clock::time_point::max(), {}, {}};  // ends_at is looked at here
    connection.answer.emplace(0, connection.fd, limits, std::move(header), file_, connection.mapping, std::move(runs));
}

void Server::set_endpoint(std::string name) {
    std::lock_guard lock(mutex_);
    endpoint_ = std::move(name);
}

std::string Server::endpoint() {
    std::lock_guard lock(mutex_);
    return endpoint_;
}

void Server::count_answer(Connection& connection, bool whole) {
    IoEvent done;
    connection.answer->fill_final(&done);
    counters_.bytes_served += done.bytes;
    if (whole) counters_.blocks_served += connection.answer_blocks;
    connection.answer.reset();
}

// Never in the middle of an answer: nothing is received or taken from the inbox while one is on its way.
Server::Next Server::reject(Connection& connection, const char* why) {
    ++counters_.protocol_errors;
    tell(connection.node, why);
    const std::string words = error_frame("protocol", why);
    [[maybe_unused]] const ssize_t n = send(connection.fd, words.data(), words.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    return Next::end;
}

void Server::release(Connection& connection) {
    if (connection.lease == 0) return;
    store_->release(connection.lease, seconds_now(), connection.node);
    connection.lease = 0;
    connection.ends_at = kNever;
    --counters_.leases_held;
}

bool Server::arm(uint64_t id, Connection& connection, uint32_t events) {
    if (events == connection.armed) return true;
    epoll_event event{};
    event.events = connection.armed = events;
    event.data.u64 = id;
    return epoll_ctl(epoll_, EPOLL_CTL_MOD, connection.fd, &event) == 0;
}

// `abruptly`: what lies in the socket queue is by reference, and under a lease no longer: it is not sent either.
void Server::end(uint64_t id, Connection& connection, bool abruptly) {
    if (connection.answer) count_answer(connection, false);
    if (abruptly) {
        ++counters_.cut_off;
        const linger at_once{1, 0};
        setsockopt(connection.fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    }
    close(connection.fd);  // and with that it leaves the epoll set
    release(connection);
    connections_.erase(id);
    --active_;
}

// Ends what is over its time, and finds the next.
void Server::sweep() {
    const double now = seconds_now();
    check_at_ = kNever;
    for (auto it = connections_.begin(); it != connections_.end();) {
        const uint64_t id = it->first;
        Connection& connection = it->second;
        ++it;  // end() erases the entry
        if (connection.ends_at > now) {
            check_at_ = std::min(check_at_, connection.ends_at);
        } else if (connection.answer) {
            end(id, connection, true);
        } else {
            release(connection);
        }
    }
}

void Server::end_all() {
    while (!connections_.empty()) {
        const auto it = connections_.begin();
        end(it->first, it->second, false);
    }
    std::lock_guard lock(mutex_);
    for (const Incoming& in : incoming_) close(in.fd), --active_;
    incoming_.clear();
}

}  // namespace p2pkv
