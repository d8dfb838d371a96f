#include "lane.hpp"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "frame.hpp"
#include "lane_state.hpp"
#include "msgpack.hpp"

namespace p2pkv {
namespace {

constexpr size_t kBodyBytesMax = 2 << 20;  // a GET of 16,384 keys of 64 bytes is half of that
constexpr size_t kRecvBytes = 64 << 10;
constexpr size_t kOutBytesMax = 16 << 20;
constexpr uint32_t kWaitingMax = 1024;  // the client itself leaves at most 256 unanswered
constexpr uint64_t kKeysMax = 16384;           // p2pkv/wire/fields.py
constexpr double kDeadlineMax = 600;           // seconds; as DEADLINE_MS_MAX in p2pkv/agent/ipc.py
constexpr uint64_t kJobBase = uint64_t{1} << 62;  // apart from the jobs of p2pkv/transport/movers.py
constexpr int kEventsMax = 64;
constexpr size_t kDistrustedMax = 8192;  // twice what p2pkv/transport/distrust.py keeps
constexpr size_t kMissesMax = 1024;      // of more Python finds out whether anybody has them: it takes a millisecond
constexpr uint64_t kWake = ~uint64_t{0};

}  // namespace

Lane::Lane(store::Store& store, IoEngine& receiver, Pool& pool, NixlReads* nixl, const index::Lookup& lookup,
           LaneOptions options)
    : store_(store),
      receiver_(receiver),
      pool_(pool),
      nixl_(nixl),
      lookup_(lookup),
      options_(options),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wake_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      next_job_(kJobBase) {
    if (epoll_ < 0 || wake_fd_ < 0) throw std::runtime_error("epoll or eventfd failed");
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = kWake;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_fd_, &event);
    thread_ = std::thread([this] { run(); });
}

Lane::~Lane() {
    stop();
    ::close(epoll_);
    ::close(wake_fd_);
}

// --- connections

Lane::ConnectionRef Lane::find(uint64_t id) {
    std::lock_guard lock(mutex_);
    const auto it = connections_.find(id);
    return it == connections_.end() ? nullptr : it->second;
}

void Lane::add(uint64_t id, int fd, uint64_t holder) {
    auto connection = std::make_shared<Connection>(id, fd, holder);
    {
        std::lock_guard lock(mutex_);
        connections_[id] = connection;
    }
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = id;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
}

void Lane::allow(uint64_t id, uint64_t space, uint64_t salt) {
    if (const ConnectionRef connection = find(id)) {
        std::lock_guard lock(connection->mutex);
        connection->salts[space] = salt;
    }
}

bool Lane::send(uint64_t id, std::string frame) {
    const ConnectionRef connection = find(id);
    if (connection == nullptr) return false;
    send_frame(*connection, std::move(frame));
    return true;
}

// From here on it gets no answers. What it has sent is still read, by the lane's thread, up to its end: it may be giving
// a lease back.
void Lane::close(uint64_t id) {
    const ConnectionRef connection = find(id);
    if (connection == nullptr) return;
    std::lock_guard lock(connection->mutex);
    connection->closed = true;
    shutdown(connection->fd, SHUT_RDWR);
}

// The engine has gone, or is sent away: from the lane's thread.
void Lane::end(const ConnectionRef& connection, std::string why) {
    {
        std::lock_guard lock(mutex_);
        connections_.erase(connection->id);
    }
    {
        std::lock_guard lock(connection->mutex);
        epoll_ctl(epoll_, EPOLL_CTL_DEL, connection->fd, nullptr);
        shutdown(connection->fd, SHUT_RDWR);
        if (std::exchange(connection->closed, true)) return;
    }
    LaneEvent event;
    event.kind = LaneEvent::Kind::gone;
    event.connection = connection->id;
    event.detail = std::move(why);
    events_.push(std::move(event));
}

void Lane::send_frame(Connection& connection, std::string frame) {
    std::lock_guard lock(connection.mutex);
    if (connection.closed) return;
    if (!connection.out.empty()) {
        connection.out += frame;
    } else {
        size_t sent = 0;
        const ssize_t n = ::send(connection.fd, frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) sent = static_cast<size_t>(n);
        if (n < 0 && errno != EAGAIN && errno != EINTR) return;  // the lane's thread sees the end, too
        if (sent == frame.size()) return;
        connection.out.assign(frame, sent);
        epoll_event event{};
        event.events = EPOLLIN | EPOLLOUT;
        event.data.u64 = connection.id;
        epoll_ctl(epoll_, EPOLL_CTL_MOD, connection.fd, &event);
    }
    if (connection.out.size() > kOutBytesMax) shutdown(connection.fd, SHUT_RDWR);  // it does not read its answers
}

void Lane::flush(const ConnectionRef& connection) {
    std::lock_guard lock(connection->mutex);
    if (connection->closed || connection->out.empty()) return;
    const ssize_t n = ::send(connection->fd, connection->out.data(), connection->out.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) connection->out.erase(0, static_cast<size_t>(n));
    if (!connection->out.empty()) return;
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = connection->id;
    epoll_ctl(epoll_, EPOLL_CTL_MOD, connection->fd, &event);
}

// --- frames

void Lane::run() {
    pthread_setname_np(pthread_self(), "p2pkv-lane");
    epoll_event events[kEventsMax];
    while (!stopping_) {
        const int n = epoll_wait(epoll_, events, kEventsMax, owed_.empty() ? -1 : kReleaseMs);
        if (!owed_.empty()) release_due(now_s());
        for (int i = 0; i < n && !stopping_; ++i) {
            const ConnectionRef connection = find(events[i].data.u64);
            if (connection == nullptr) continue;
            if (events[i].events & EPOLLOUT) flush(connection);
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(connection);
        }
    }
}

void Lane::on_readable(const ConnectionRef& connection) {
    static thread_local std::vector<char> buffer(kRecvBytes);
    const ssize_t n = recv(connection->fd, buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) return end(connection, "");
    connection->in.append(buffer.data(), static_cast<size_t>(n));
    if (!on_frames(connection)) return end(connection, "what came on an engine's short way is not a GET or RELEASE");
    if (connection->waiting > kWaitingMax) end(connection, "too many gets at once");
}

// False: the engine breaks the protocol.
bool Lane::on_frames(const ConnectionRef& connection) {
    std::string& in = connection->in;
    size_t at = 0;
    while (in.size() - at >= frame::kHeaderBytes) {
        const frame::Header header = frame::parse(in.data() + at);
        if (header.version != frame::kVersion || header.length > kBodyBytesMax) return false;
        if (in.size() - at - frame::kHeaderBytes < header.length) break;
        const std::string_view body(in.data() + at + frame::kHeaderBytes, header.length);
        at += frame::kHeaderBytes + header.length;
        if (header.type == kEngineRelease) {
            if (!on_release(connection, body)) return false;
        } else if (header.type == kEngineGet) {
            auto request = std::make_shared<Request>();
            request->connection = connection;
            request->id = header.request_id;
            request->body = body;
            if (!parse_get(*request)) return false;
            on_get(request);
        } else {
            return false;
        }
    }
    in.erase(0, at);
    return true;
}

bool Lane::on_release(const ConnectionRef& connection, std::string_view body) {
    msgpack::Reader reader(body);
    uint64_t count, lease;
    if (!reader.array(&count) || count < 1 || !reader.uint(&lease) || !reader.skip(count - 1) || !reader.at_end()) return false;
    store_.release(lease, now_s(), connection->holder);
    return true;
}

bool Lane::parse_get(Request& request) {
    msgpack::Reader reader(request.body);
    uint64_t fields, count, deadline_ms;
    if (!reader.array(&fields) || fields < 3 || !reader.uint(&request.space)) return false;
    if (!reader.array(&count) || count > kKeysMax) return false;
    request.keys.resize(count);
    for (std::string_view& key : request.keys)
        if (!reader.bin(&key) || key.size() < store::kKeyBytesMin || key.size() > store::kKeyBytesMax) return false;
    if (!reader.uint(&deadline_ms)) return false;
    uint64_t processor = kNoProcessor;
    if (fields > 3 && (!reader.uint(&processor) || processor > kNoProcessor)) return false;
    if (fields > 4 && !reader.boolean(&request.unleased)) return false;
    if (!reader.skip(fields - std::min<uint64_t>(fields, 5)) || !reader.at_end()) return false;
    request.processor = static_cast<uint32_t>(processor);
    request.asked_at = now_s();
    request.deadline = request.asked_at + std::min(static_cast<double>(deadline_ms) / 1000, kDeadlineMax);
    request.settled.assign(count, 0);
    request.left = count;
    request.failed.assign(count, kUnsettled);
    return true;
}

// --- GET

void Lane::on_get(const std::shared_ptr<Request>& request) {
    Connection& connection = *request->connection;
    bool allowed;
    {
        std::lock_guard lock(connection.mutex);
        if (connection.closed) return;
        const auto salt = connection.salts.find(request->space);
        allowed = salt != connection.salts.end();
        if (allowed) request->salt = salt->second;
    }
    if (!allowed || draining_ || request->keys.empty() || connection.in_flight >= options_.in_flight_max)
        return hand_over(*request, 0, Code::ok);

    const store::Pinned pinned =
        store_.pin(request->space, request->keys, options_.lease_ttl_s, now_s(), connection.holder);
    std::vector<uint32_t> here, missing;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < request->keys.size(); ++i) {
        if (!pinned.places[i].hit) {
            missing.push_back(i);
            continue;
        }
        here.push_back(i);
        request->settled[i] = 1;
        --request->left;
        bytes += pinned.places[i].length;
    }
    hits_local += here.size();
    bytes_local += bytes;
    const bool more = here.size() < request->keys.size();
    if (!here.empty()) send_got(*request, pinned, here, kLocal, kBusy, more);
    if (!more || start_pull(request)) return;
    const bool all_looked_at = pinned.considered == request->keys.size();  // else this engine holds as much as it may
    if (!all_looked_at || !nobody_has(*request, missing)) return hand_over(*request, 0, Code::ok);
    misses += missing.size();
    send_got(*request, {.places = std::vector<store::Place>(request->keys.size())}, missing, 0, kMiss, false);
}

// Whether whoever has any of these blocks, by the index, is not asked now.
bool Lane::nobody_has(const Request& request, const std::vector<uint32_t>& missing) {
    if (missing.size() > kMissesMax) return false;
    return std::all_of(missing.begin(), missing.end(), [&](uint32_t i) {
        const uint64_t key = index_key(request.keys[i], request.salt);
        uint32_t holders[kHoldersMax];
        const size_t count = lookup_.holders_of_all(lookup_.index, &key, 1, holders, kHoldersMax);
        return count < kHoldersMax && std::all_of(holders, holders + count, [&](uint32_t slot) { return pool_.shunned(slot); });
    });
}

void Lane::hand_over(Request& request, uint64_t node, Code code) {
    ++handed_over;
    ++request.connection->waiting;
    LaneEvent event;
    event.kind = LaneEvent::Kind::rest;
    event.connection = request.connection->id;
    event.request_id = request.id;
    event.space = request.space;
    event.keys.assign(request.keys.begin(), request.keys.end());
    event.statuses = request.failed;
    event.settled = request.settled;
    event.asked_at = request.asked_at;
    event.deadline = request.deadline;
    event.node = node;
    event.code = code;
    events_.push(std::move(event));
}

void Lane::send_got(Request& request, const store::Pinned& pinned, const std::vector<uint32_t>& indices,
                    unsigned char source, unsigned char if_gone, bool more) {
    std::string body, statuses, sources;
    msgpack::Writer writer(&body);
    // Counted from when the request came: the engine counts from before it asked, so its end is never after ours.
    const double ttl_s = pinned.lease != 0 ? pinned.ttl_s + (now_s() - request.asked_at) : 0;
    const auto count = static_cast<uint32_t>(indices.size());
    for (const uint32_t i : indices) {
        const bool hit = pinned.places[i].hit;  // busy: it came and had to go again, or this engine may hold no more at once
        statuses.push_back(static_cast<char>(hit ? kOk : if_gone));
        sources.push_back(static_cast<char>(hit ? source : 0));
    }
    writer.array(7);
    writer.uint(pinned.lease);
    writer.uint(static_cast<uint64_t>(ttl_s * 1000));
    writer.array(count);
    for (const uint32_t i : indices) writer.uint(i);
    writer.bin(statuses);
    writer.bin(sources);
    writer.array(count);
    for (const uint32_t i : indices) {
        writer.array(2);
        writer.uint(pinned.places[i].hit ? pinned.places[i].offset : 0);
        writer.uint(pinned.places[i].hit ? pinned.places[i].length : 0);
    }
    writer.boolean(more);
    send_frame(*request.connection, frame::make(kEngineGot, request.id, body));
}

// --- for Python

std::vector<LaneEvent> Lane::drain() {
    std::vector<LaneEvent> events = events_.drain();
    for (const LaneEvent& event : events) {
        if (event.kind != LaneEvent::Kind::rest) continue;
        if (const ConnectionRef connection = find(event.connection)) --connection->waiting;
    }
    return events;
}

bool Lane::watch(uint64_t space, const std::string& key) {
    std::lock_guard lock(mutex_);
    const auto it = flights_.find(flight_of(space, key));
    if (it == flights_.end()) return false;
    it->second = true;
    return true;
}

void Lane::distrust(uint64_t space, const std::string& key, bool distrusted) {
    std::lock_guard lock(mutex_);
    if (!distrusted) {
        distrusted_.erase(flight_of(space, key));
    } else if (distrusted_.size() < kDistrustedMax) {
        distrusted_.insert(flight_of(space, key));
    }
}

size_t Lane::in_flight() const {
    std::lock_guard lock(mutex_);
    return pulls_.size();
}

size_t Lane::blocks_in_flight() const {
    std::lock_guard lock(mutex_);
    return flights_.size();
}

void Lane::stop() {
    if (stopping_.exchange(true)) return;
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof one);
    if (thread_.joinable()) thread_.join();
    std::vector<uint64_t> jobs;
    std::vector<ConnectionRef> connections;
    {
        std::lock_guard lock(mutex_);
        jobs.assign(pulls_.begin(), pulls_.end());
        for (const auto& [id, connection] : connections_) connections.push_back(connection);
    }
    for (const uint64_t job : jobs) receiver_.cancel(job);
    if (nixl_ != nullptr) nixl_->stop();
    while (in_flight() > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the I/O thread ends them all
    for (const ConnectionRef& connection : connections) end(connection, "");
}

}  // namespace p2pkv
