#include "lane.hpp"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "msgpack.hpp"

namespace p2pkv {
namespace {

constexpr size_t kHeaderBytes = 12;  // p2pkv/wire/frame.py
constexpr unsigned char kFrameVersion = 1;
constexpr size_t kBodyBytesMax = 2 << 20;  // a GET of 16,384 keys of 64 bytes is half of that
constexpr size_t kRecvBytes = 64 << 10;
constexpr size_t kOutBytesMax = 16 << 20;
constexpr uint32_t kWaitingMax = 1024;  // the client itself leaves at most 256 unanswered
constexpr uint64_t kKeysMax = 16384;           // p2pkv/wire/fields.py
constexpr double kDeadlineMax = 600;           // seconds; as DEADLINE_MS_MAX in p2pkv/agent/ipc.py
constexpr uint64_t kJobBase = uint64_t{1} << 62;  // apart from the jobs of p2pkv/transport/movers.py
constexpr uint32_t kHoldersMax = 16;
constexpr int kEventsMax = 64;
constexpr uint64_t kWake = ~uint64_t{0};

// p2pkv/wire/engine.py and p2pkv/wire/peer.py
constexpr unsigned char kTypeGet = 73, kTypeGot = 74, kTypeRelease = 75, kTypeAhead = 79;
constexpr unsigned char kPeerRelease = 10, kPeerGet = 12;
// p2pkv/types.py and p2pkv/wire/engine.py
constexpr unsigned char kMiss = 1, kTimeout = 3, kUnreachable = 4, kBusy = 5, kLost = 8;
constexpr unsigned char kLocal = 1, kPeer = 2;

double now_s() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

std::string frame_of(unsigned char type, uint32_t request_id, const std::string& body) {
    std::string frame(kHeaderBytes, '\0');
    const uint32_t length = static_cast<uint32_t>(body.size());
    std::memcpy(frame.data(), &length, 4);
    frame[4] = static_cast<char>(kFrameVersion);
    frame[5] = static_cast<char>(type);
    std::memcpy(frame.data() + 8, &request_id, 4);
    return frame += body;
}

std::string flight_of(uint64_t space, std::string_view key) {
    std::string name(reinterpret_cast<const char*>(&space), sizeof space);
    return name += key;
}

unsigned char status_of(Code code) {
    switch (code) {
        case Code::ok: return kMiss;
        case Code::timeout:
        case Code::stalled: return kTimeout;
        case Code::closed:
        case Code::protocol: return kUnreachable;
        case Code::cancelled: return kLost;
        case Code::refused: return kBusy;
    }
    return kLost;
}

}  // namespace

struct Lane::Connection {
    Connection(uint64_t id, int fd, uint64_t holder) : id(id), fd(fd), holder(holder) {}
    ~Connection() { ::close(fd); }  // not before: another thread could be about to use its number

    const uint64_t id;
    const int fd;
    const uint64_t holder;
    std::atomic<uint32_t> in_flight{0};
    std::atomic<uint32_t> waiting{0};  // GETs handed over that Python has not looked at yet
    std::string in;  // the lane's thread only

    std::mutex mutex;  // guards what follows, and writing to fd
    std::unordered_map<uint64_t, uint64_t> salts;  // per namespace that may be asked for
    std::string out;
    bool closed = false;
};

struct Lane::Request {
    ConnectionRef connection;
    uint32_t id = 0;
    double asked_at = 0, deadline = 0;
    uint64_t space = 0, salt = 0;
    std::string body;                    // what the keys are views of
    std::vector<std::string_view> keys;

    std::mutex mutex;  // guards what follows: pulls may end on two threads at once
    std::vector<unsigned char> settled;  // per key: 1 once the engine has been answered
    std::vector<unsigned char> failed;   // per key: how the lane's attempt at it failed
    size_t left = 0;                     // keys that are not settled
    size_t pulls = 0;                    // under way
    uint64_t failed_node = 0;            // whom Python should not ask first
    Code failed_code = Code::ok;
};

struct Lane::Pull {
    std::shared_ptr<Request> request;
    uint64_t job = 0;
    uint64_t node = 0;
    uint32_t slot = 0;
    int fd = -1;
    double first_byte_s = 0;
    std::vector<uint32_t> indices;  // into the request's keys
    std::vector<store::BlockRef> blocks;
    size_t done = 0;      // of them, committed or aborted
    uint64_t came = 0;    // committed
    bool told_ahead = false;
};

Lane::Lane(store::Store& store, IoEngine& receiver, Pool& pool, const index::Lookup& lookup, LaneOptions options)
    : store_(store),
      receiver_(receiver),
      pool_(pool),
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
        const int n = epoll_wait(epoll_, events, kEventsMax, -1);
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
    while (in.size() - at >= kHeaderBytes) {
        uint32_t length, request_id;
        std::memcpy(&length, in.data() + at, 4);
        std::memcpy(&request_id, in.data() + at + 8, 4);
        const auto version = static_cast<unsigned char>(in[at + 4]), type = static_cast<unsigned char>(in[at + 5]);
        if (version != kFrameVersion || length > kBodyBytesMax) return false;
        if (in.size() - at < kHeaderBytes + length) break;
        const std::string_view body(in.data() + at + kHeaderBytes, length);
        at += kHeaderBytes + length;
        if (type == kTypeRelease) {
            if (!on_release(connection, body)) return false;
        } else if (type == kTypeGet) {
            auto request = std::make_shared<Request>();
            request->connection = connection;
            request->id = request_id;
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
    if (!reader.uint(&deadline_ms) || !reader.skip(fields - 3) || !reader.at_end()) return false;
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
    std::vector<uint32_t> here;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < request->keys.size(); ++i) {
        if (!pinned.places[i].hit) continue;
        here.push_back(i);
        request->settled[i] = 1;
        --request->left;
        bytes += pinned.places[i].length;
    }
    hits_local += here.size();
    bytes_local += bytes;
    const bool more = here.size() < request->keys.size();
    if (!here.empty()) send_got(*request, pinned, here, kLocal, more);
    if (more && !start_pull(request)) hand_over(*request, 0, Code::ok);
}

// Whether what is missing is on its way. It is when one peer has all of it, enough connections to that peer are idle,
// and nobody else is writing any of it.
bool Lane::start_pull(const std::shared_ptr<Request>& request) {
    std::vector<std::shared_ptr<Pull>> pulls;
    const bool planned = plan(request, &pulls);
    if (!planned) {
        for (const auto& pull : pulls) {
            for (const store::BlockRef& block : pull->blocks) store_.abort(block);
            pool_.give(pull->node, pull->slot, pull->fd);
        }
        return false;
    }
    request->pulls = pulls.size();
    request->connection->in_flight += static_cast<uint32_t>(pulls.size());
    {
        std::lock_guard lock(mutex_);
        for (const auto& pull : pulls) {
            pull->job = next_job_++;
            pulls_.insert(pull->job);
        }
    }
    for (const auto& pull : pulls) submit(pull);
    return true;
}

// Connections taken and slots reserved; false: it cannot be done, and what is in `pulls` has to be given back.
bool Lane::plan(const std::shared_ptr<Request>& request, std::vector<std::shared_ptr<Pull>>* pulls) {
    std::vector<uint32_t> missing;
    std::vector<uint64_t> index_keys;
    std::unordered_set<std::string_view> twins;
    for (uint32_t i = 0; i < request->keys.size(); ++i) {
        if (request->settled[i]) continue;
        uint64_t hash;
        std::memcpy(&hash, request->keys[i].data(), sizeof hash);
        missing.push_back(i);
        index_keys.push_back(hash ^ request->salt);
        if (request->left > 1 && !twins.insert(request->keys[i]).second) return false;
    }
    const uint64_t block_bytes = store_.block_bytes(request->space);
    if (block_bytes == 0) return false;
    uint32_t slots[kHoldersMax];
    const size_t holders =
        lookup_.holders_of_all(lookup_.index, index_keys.data(), index_keys.size(), slots, kHoldersMax);
    if (holders == 0) return false;

    const uint64_t bytes = missing.size() * block_bytes;
    const size_t streams = std::clamp<size_t>((bytes + options_.stream_bytes - 1) / options_.stream_bytes, 1,
                                              std::min<size_t>(options_.streams, missing.size()));
    const size_t turn = next_job_ % holders;  // so that no holder of a hot block is asked most
    for (size_t h = 0; h < holders && pulls->empty(); ++h) {
        const uint32_t slot = slots[(turn + h) % holders];
        while (pulls->size() < streams) {
            const Pool::Taken taken = pool_.take_slot(slot);
            if (taken.fd < 0) break;
            auto pull = std::make_shared<Pull>();
            pull->request = request;
            pull->slot = slot;
            pull->node = taken.node;
            pull->fd = taken.fd;
            pull->first_byte_s = taken.first_byte_s;
            pulls->push_back(std::move(pull));
        }
    }
    if (pulls->size() < streams) return false;  // Python dials; they are in the pool next time

    if (!take_off(*request, missing)) return false;
    const double now = now_s();
    for (size_t n = 0; n < missing.size(); ++n) {  // neighbours go together
        Pull& pull = *(*pulls)[n * streams / missing.size()];
        store::BlockRef block;
        const std::string_view key = request->keys[missing[n]];
        if (store_.reserve(request->space, key, now, &block) != store::Reserved::ok) {
            call_off(*request, missing);
            return false;
        }
        pull.indices.push_back(missing[n]);
        pull.blocks.push_back(std::move(block));
    }
    return true;
}

// Say that these blocks are being pulled, before their slots are reserved: whom the store tells that somebody writes a
// block can watch it, until that is over. False: one of them is being pulled already.
bool Lane::take_off(const Request& request, const std::vector<uint32_t>& indices) {
    std::lock_guard lock(mutex_);
    for (size_t n = 0; n < indices.size(); ++n) {
        if (flights_.emplace(flight_of(request.space, request.keys[indices[n]]), false).second) continue;
        while (n-- > 0) flights_.erase(flight_of(request.space, request.keys[indices[n]]));
        return false;
    }
    return true;
}

void Lane::call_off(const Request& request, const std::vector<uint32_t>& indices) {
    LaneEvent landed;
    landed.kind = LaneEvent::Kind::landed;
    landed.space = request.space;
    {
        std::lock_guard lock(mutex_);
        for (const uint32_t i : indices) {
            const auto flight = flights_.find(flight_of(request.space, request.keys[i]));
            if (flight->second) {
                landed.keys.emplace_back(request.keys[i]);
                landed.statuses.push_back(kLost);
            }
            flights_.erase(flight);
        }
    }
    if (!landed.keys.empty()) events_.push(std::move(landed));
}

void Lane::submit(const std::shared_ptr<Pull>& pull) {
    const Request& request = *pull->request;
    std::vector<Destination> destinations;
    for (const store::BlockRef& block : pull->blocks)
        destinations.push_back({reinterpret_cast<unsigned char*>(options_.arena) + store::Store::offset_of(*block),
                                static_cast<uint32_t>(store::Store::length_of(*block))});
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(3);
    writer.uint(request.space);
    writer.array(static_cast<uint32_t>(pull->indices.size()));
    for (const uint32_t i : pull->indices) writer.bin(request.keys[i]);
    writer.uint(static_cast<uint64_t>(options_.lease_ttl_s * 1000));
    const auto to_duration = [](double s) {
        return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::max(0.0, s)));
    };
    const Limits limits{Clock::now() + to_duration(request.deadline - now_s()), to_duration(pull->first_byte_s),
                        to_duration(options_.stall_s)};
    auto receive = std::make_unique<Receive>(pull->job, pull->fd, limits, frame_of(kPeerGet, 0, body),
                                             std::move(destinations), options_.partial_bytes, options_.ahead_bytes);
    receive->on_event = [this, pull](IoEvent event) { on_event(*pull, std::move(event)); };
    if (receiver_.submit(std::move(receive))) return;
    IoEvent refused;  // it is full; the request is handed over once all its pulls are over
    refused.final = true;
    refused.code = Code::cancelled;
    on_event(*pull, std::move(refused));
}

// Blocks of a pull have come, or it is over. On the I/O thread, or the lane's.
void Lane::on_event(Pull& pull, IoEvent event) {
    if (event.ahead_bytes != 0) return send_ahead(pull, event);
    LaneEvent landed;
    landed.kind = LaneEvent::Kind::landed;
    if (event.final && event.code == Code::ok) {
        pool_.give(pull.node, pull.slot, pull.fd, true);  // before the answer: the engine's next get may need it
    } else if (event.final) {
        ::close(pull.fd);
    }
    settle_blocks(pull, event, &landed);
    if (event.final) return on_end(pull, std::move(event), std::move(landed));
    if (landed.keys.empty()) return;
    landed.space = pull.request->space;
    landed.node = pull.node;
    events_.push(std::move(landed));
}

// Bytes have landed that the engine may copy before they are proven: what it copies counts only if GOT says so later.
void Lane::send_ahead(Pull& pull, const IoEvent& event) {
    const Request& request = *pull.request;
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(3);
    writer.uint(pull.indices[event.first]);
    writer.uint(event.ahead_bytes == 0 ? 0 : store::Store::offset_of(*pull.blocks[event.first]));
    writer.uint(event.ahead_bytes);
    pull.told_ahead = true;
    send_frame(*request.connection, frame_of(kTypeAhead, request.id, body));
}

// Commit what has come, and give it to the engine.
void Lane::settle_blocks(Pull& pull, const IoEvent& event, LaneEvent* landed) {
    Request& request = *pull.request;
    const double now = now_s();
    const size_t end = event.final ? pull.blocks.size() : pull.done + event.statuses.size();
    const size_t first = pull.done;
    std::vector<uint32_t> came;
    std::vector<std::string_view> keys;
    for (; pull.done < end; ++pull.done) {
        const uint32_t index = pull.indices[pull.done];
        const store::BlockRef& block = pull.blocks[pull.done];
        const size_t n = pull.done - first;
        const unsigned char status = n < event.statuses.size() ? event.statuses[n] : status_of(event.code);
        if (status == kOk && store_.commit(block, event.digests[n], now)) {
            came.push_back(index);
            keys.push_back(request.keys[index]);
            pull.came += 1;
            bytes_peer += store::Store::length_of(*block);
            continue;
        }
        if (status != kOk) store_.abort(block);
        landed->rejected += status == kRejected;
        landed->missed += status == kMiss;
        std::lock_guard lock(request.mutex);
        request.failed[index] = status == kOk ? kLost : status;
    }
    {
        std::lock_guard lock(mutex_);
        for (size_t i = first; i < end; ++i) {
            const auto flight = flights_.find(flight_of(request.space, request.keys[pull.indices[i]]));
            if (flight == flights_.end()) continue;
            if (flight->second) {
                const unsigned char failed = request.failed[pull.indices[i]];
                landed->keys.emplace_back(request.keys[pull.indices[i]]);
                landed->statuses.push_back(failed == kUnsettled ? kOk : failed);
            }
            flights_.erase(flight);
        }
    }
    hits_peer += came.size();
    if (came.empty()) return;
    {
        std::lock_guard lock(request.connection->mutex);
        if (request.connection->closed) return;
    }
    store::Pinned pinned = store_.pin(request.space, keys, options_.lease_ttl_s, now, request.connection->holder);
    std::vector<store::Place> places(request.keys.size());  // send_got looks them up by the request's index
    for (size_t i = 0; i < came.size(); ++i) places[came[i]] = pinned.places[i];
    pinned.places = std::move(places);
    // Under the mutex until it is sent: the last part has to be the last one.
    std::lock_guard lock(request.mutex);
    for (const uint32_t index : came) request.settled[index] = 1;
    request.left -= came.size();
    send_got(request, pinned, came, kPeer, request.left > 0);
}

void Lane::on_end(Pull& pull, IoEvent event, LaneEvent landed) {
    Request& request = *pull.request;
    pool_.learn(pull.node, event.waited_s);
    if (event.code == Code::ok) {
        std::string body;
        msgpack::Writer writer(&body);
        writer.array(1);
        writer.uint(0);
        pool_.settle(pull.node, pull.fd, frame_of(kPeerRelease, 0, body));
    }
    if (event.code == Code::stalled) pool_.drop(pull.node);  // its other connections will not answer either
    landed.space = request.space;
    landed.node = pull.node;
    landed.code = event.code;
    landed.final = true;
    landed.blocks = pull.came;
    landed.failed = pull.indices.size() - pull.came;
    landed.bytes = event.bytes;
    landed.waited_s = event.waited_s;
    landed.detail = std::move(event.detail);
    const bool bad = landed.failed > 0;
    if (bad && pull.told_ahead) {  // the engine must not take these bytes for a later attempt's
        event.first = 0;
        event.ahead_bytes = 0;
        send_ahead(pull, event);
    }
    events_.push(std::move(landed));
    bool rest;
    {
        std::lock_guard lock(request.mutex);
        if (bad) {
            request.failed_node = pull.node;
            request.failed_code = event.code;
        }
        rest = --request.pulls == 0 && request.left > 0;
    }
    if (rest) hand_over(request, request.failed_node, request.failed_code);
    --request.connection->in_flight;
    std::lock_guard lock(mutex_);
    pulls_.erase(pull.job);
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
                    unsigned char source, bool more) {
    std::string body, statuses, sources;
    msgpack::Writer writer(&body);
    // Counted from when the request came: the engine counts from before it asked, so its end is never after ours.
    const double ttl_s = pinned.lease != 0 ? pinned.ttl_s + (now_s() - request.asked_at) : 0;
    const auto count = static_cast<uint32_t>(indices.size());
    for (const uint32_t i : indices) {
        const bool hit = pinned.places[i].hit;  // it came and had to go again, or this engine may hold no more at once
        statuses.push_back(static_cast<char>(hit ? kOk : kBusy));
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
    send_frame(*request.connection, frame_of(kTypeGot, request.id, body));
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
    while (in_flight() > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the I/O thread ends them all
    for (const ConnectionRef& connection : connections) end(connection, "");
}

}  // namespace p2pkv
