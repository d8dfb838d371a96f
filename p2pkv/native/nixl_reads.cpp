#include "nixl_reads.hpp"

#include <pthread.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>

#include "frame.hpp"
#include "msgpack.hpp"

namespace p2pkv {
namespace {

// p2pkv/transport/nixl_wire.py
constexpr unsigned char kRead = 6, kProgress = 7, kDone = 8, kClear = 9;
constexpr uint64_t kStatusOk = 0, kStatusTimeout = 2, kStatusCancelled = 3, kStatusNoPeer = 4, kStatusBusy = 6,
                   kStatusDisconnected = 7;
constexpr size_t kBodyBytesMax = (24 * 16384) + 4096;
constexpr size_t kReceiveBytes = 64 << 10;
constexpr size_t kReadsMax = 512;
constexpr uint64_t kPieceBytes = 4 << 20;  // a step of progress costs what copying 300 KiB does
constexpr double kGraceS = 0.02;           // the process answers at the deadline; so long after it we do
// While reads land, their news are looked for rather than waited for: on a virtual machine an idle processor is asleep, the
// scheduler wakes nobody there, and who is woken by the reading process is put before it, on its own processor. So long
// after the last news, and giving way to whoever else wants this processor.
constexpr double kLookS = 2e-3;
constexpr uint64_t kBell = 0, kWake = 1, kSocket = 2;

std::string request_of(uint32_t id, const std::string& peer, std::string_view runs, double deadline) {
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(4);
    writer.str(peer);
    writer.bin(runs);
    writer.uint(kPieceBytes);
    writer.uint(static_cast<uint64_t>(deadline * 1e9));
    return frame::make(kRead, id, body);
}

double now_s() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

}  // namespace

struct NixlReads::Socket {
    explicit Socket(int fd) : fd(fd) {}
    ~Socket() { ::close(fd); }  // not before: another thread could be about to use its number
    Socket(const Socket&) = delete;
    Socket& operator=(const Socket&) = delete;
    const int fd;
};

struct NixlReads::Active {
    uint32_t id = 0;
    NixlRead read;
    std::vector<unsigned char> statuses;
    std::vector<Digest> digests;
    std::vector<uint32_t> wanted;  // the blocks that are there
    size_t next = 0;               // position in `wanted` of the block that lands
    uint64_t before = 0;           // bytes of the blocks before it
    uint32_t hashed = 0;           // bytes of it that have been checksummed
    size_t reported = 0;           // blocks (not positions) that have been told
    uint64_t unreported = 0;       // bytes of finished blocks that have not
    uint64_t landed = 0;
    HashState hash;
};

NixlReads::NixlReads(store::Store& store, uintptr_t arena, uint64_t partial_bytes)
    : store_(store),
      arena_(arena),
      partial_bytes_(partial_bytes),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wake_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      bell_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (epoll_ < 0 || wake_fd_ < 0 || bell_ < 0) throw std::runtime_error("epoll or eventfd failed");
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = kWake;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_fd_, &event);
    event.data.u64 = kBell;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, bell_, &event);
    thread_ = std::thread([this] { run(); });
}

void NixlReads::stop() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    wake();
    if (thread_.joinable()) thread_.join();
}

NixlReads::~NixlReads() {
    stop();
    if (offered_ >= 0) ::close(offered_);
    ::close(epoll_);
    ::close(wake_fd_);
    ::close(bell_);
}

void NixlReads::wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof one);
}

// --- for Python

void NixlReads::attach(int fd, pid_t process) {
    {
        std::lock_guard lock(mutex_);
        if (offered_ >= 0) ::close(offered_);
        offered_ = fd;
        process_ = process;
    }
    wake();
}

void NixlReads::detach() {
    {
        std::lock_guard lock(mutex_);
        peers_.clear();
        reaped_ = true;
        process_ = 0;
        if (offered_ >= 0) ::close(std::exchange(offered_, -1));
    }
    wake();
}

void NixlReads::set_peer(uint64_t node, std::string endpoint) {
    std::lock_guard lock(mutex_);
    peers_[node] = std::move(endpoint);
}

void NixlReads::drop_peer(uint64_t node) {
    std::lock_guard lock(mutex_);
    peers_.erase(node);
}

bool NixlReads::reads_from(uint64_t node) const {
    std::lock_guard lock(mutex_);
    return socket_ != nullptr && peers_.contains(node);
}

void NixlReads::want(uint64_t node, bool wanted) {
    std::lock_guard lock(mutex_);
    if (wanted) {
        wanted_.insert(node);
    } else {
        wanted_.erase(node);
    }
}

NixlReads::Way NixlReads::way_to(uint64_t node) const {
    std::lock_guard lock(mutex_);
    if (!wanted_.contains(node)) return Way::tcp;
    return socket_ != nullptr && peers_.contains(node) ? Way::one_sided : Way::not_now;
}

// --- reading

bool NixlReads::submit(NixlRead read) {
    auto active = std::make_shared<Active>();
    const size_t count = read.lengths.size();
    active->statuses = read.from.statuses;
    active->digests.resize(count);
    hash_ops().reset(&active->hash);
    std::string runs;
    for (uint32_t i = 0; i < count; ++i) {
        if (read.from.statuses[i] != kOk) continue;
        active->wanted.push_back(i);
        const uint64_t run[3] = {read.from.offsets[i], read.offsets[i], read.lengths[i]};
        runs.append(reinterpret_cast<const char*>(run), sizeof run);
    }
    const double deadline = read.deadline;
    active->read = std::move(read);
    if (runs.empty()) {
        finish(active, Code::ok, false, "");
        return true;
    }
    SocketRef socket;
    std::string request;
    pid_t process;
    {
        std::lock_guard lock(mutex_);
        const auto peer = peers_.find(active->read.node);
        if (socket_ == nullptr || stopping_ || active_.size() >= kReadsMax || peer == peers_.end()) return false;
        if (peer->second != active->read.from.endpoint) {  // replaced since we connected to it
            peers_.erase(peer);
            events_.push({NixlReadsEvent::Kind::lost, active->read.node});
            return false;
        }
        do {
            next_id_ = next_id_ == UINT32_MAX ? kFirstId : next_id_ + 1;
        } while (active_.contains(next_id_));
        active->id = next_id_;
        request = request_of(active->id, peer->second, runs, deadline);
        active_.emplace(active->id, active);
        socket = socket_;
        process = process_;
    }
    placement_.arrange(active->read.processor, process, checker_);  // while the process sleeps: that costs little
    look_until_ = now_s() + kLookS;
    wake();
    // Last of all: the scheduler may well let the process read before it lets us go on.
    std::lock_guard lock(sending_);
    const ssize_t sent = ::send(socket->fd, request.data(), request.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent == static_cast<ssize_t>(request.size())) return true;
    shutdown(socket->fd, SHUT_RDWR);  // it does not read its socket: it hangs, or is gone, and our thread ends the read
    return true;
}

// Call with the mutex held.
double NixlReads::next_deadline() const {
    double next = std::numeric_limits<double>::infinity();
    for (const auto& [id, active] : active_) next = std::min(next, active->read.deadline + kGraceS);
    return next;
}

NixlReads::ActiveRef NixlReads::take(uint32_t id) {
    std::lock_guard lock(mutex_);
    const auto it = active_.find(id);
    if (it == active_.end()) return nullptr;
    const ActiveRef found = it->second;
    active_.erase(it);
    return found;
}

// --- the thread

void NixlReads::run() {
    pthread_setname_np(pthread_self(), "p2pkv-nixl");
    checker_ = gettid();
    epoll_event events[3];
    while (true) {
        double due;
        {
            std::lock_guard lock(mutex_);
            if (stopping_) break;
            due = next_deadline();
        }
        const bool look = !std::isinf(due) && now_s() < look_until_;
        const double left_ms = std::ceil((due - now_s()) * 1e3);
        const int wait_ms = look ? 0 : std::isinf(due) ? -1 : static_cast<int>(std::clamp(left_ms, 0.0, 6e4));
        const int n = epoll_wait(epoll_, events, 3, wait_ms);
        if (n == 0 && look) sched_yield();
        for (int i = 0; i < n; ++i) {
            const uint64_t what = events[i].data.u64;
            uint64_t count;
            [[maybe_unused]] ssize_t got;
            if (what != kSocket) got = read(what == kBell ? bell_ : wake_fd_, &count, sizeof count);
            if (what == kWake) {
                adopt();
            } else {
                receive();
            }
        }
        if (due <= now_s()) end_late(now_s());
    }
    end_reads("the agent stops");  // what is held stays held: the NIXL process may live on for a moment
}

// What attach and detach have left.
void NixlReads::adopt() {
    bool reaped;
    int offered;
    {
        std::lock_guard lock(mutex_);
        reaped = std::exchange(reaped_, false);
        offered = std::exchange(offered_, -1);
    }
    if (reaped) {
        end_reads("the NIXL process died");
        clear_all();
    }
    if (offered < 0) return;
    end_reads("another NIXL process takes over");
    {
        std::lock_guard lock(mutex_);
        socket_ = std::make_shared<Socket>(offered);
    }
    epoll_event event{};
    event.events = EPOLLHUP | EPOLLRDHUP;  // what comes is announced by the bell; only the end is not
    event.data.u64 = kSocket;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, offered, &event);
}

// The socket has ended, or what came makes no sense: the process is of no use any more.
void NixlReads::on_broken(const char* why) {
    events_.push({NixlReadsEvent::Kind::broken, 0});
    end_reads(why);
}

// Close the socket. Reads fail, and may all still be written.
void NixlReads::end_reads(const char* why) {
    std::map<uint32_t, ActiveRef> active;
    {
        std::lock_guard lock(mutex_);
        if (socket_ == nullptr) return;
        epoll_ctl(epoll_, EPOLL_CTL_DEL, socket_->fd, nullptr);
        socket_ = nullptr;
        active.swap(active_);
    }
    in_.clear();
    for (const auto& [id, read] : active) finish(read, Code::closed, true, why);
}

void NixlReads::receive() {
    static thread_local std::vector<char> buffer(kReceiveBytes);
    SocketRef socket;
    {
        std::lock_guard lock(mutex_);
        socket = socket_;
    }
    if (socket == nullptr) return;
    ssize_t n;
    do {  // the bell rings after what is sent, so what does not fit now rings again or is here already
        n = recv(socket->fd, buffer.data(), buffer.size(), MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0 || (n < 0 && errno != EAGAIN)) return on_broken("the NIXL process died");
        if (n > 0) in_.append(buffer.data(), static_cast<size_t>(n));
    } while (n == static_cast<ssize_t>(buffer.size()));
    size_t at = 0;
    while (in_.size() - at >= frame::kHeaderBytes) {
        const frame::Header header = frame::parse(in_.data() + at);
        if (header.version != frame::kVersion || header.length > kBodyBytesMax)
            return on_broken("the NIXL process talks nonsense");
        if (in_.size() - at - frame::kHeaderBytes < header.length) break;
        const std::string_view body(in_.data() + at + frame::kHeaderBytes, header.length);
        at += frame::kHeaderBytes + header.length;
        if (!on_frame(header.type, header.request_id, body)) return on_broken("the NIXL process talks nonsense");
    }
    in_.erase(0, at);
}

bool NixlReads::on_frame(unsigned char type, uint32_t id, std::string_view body) {
    look_until_ = now_s() + kLookS;
    if (type == kDone) return on_done(id, body);
    msgpack::Reader reader(body);
    uint64_t fields, done_bytes;
    if (type == kClear) {
        clear(id);
        return true;
    }
    if (type != kProgress || !reader.array(&fields) || fields < 1 || !reader.uint(&done_bytes)) return false;
    ActiveRef active;
    {
        std::lock_guard lock(mutex_);
        const auto it = active_.find(id);
        if (it == active_.end()) return true;  // it was given up
        active = it->second;
    }
    if (done_bytes < active->landed) return false;
    // Within a block its news come first: the engine copies while we checksum.
    const bool within = active->next < active->wanted.size() &&
                        done_bytes - active->before < active->read.lengths[active->wanted[active->next]];
    if (within) tell_ahead(*active, done_bytes);
    land(*active, done_bytes);
    if (!within) tell_ahead(*active, done_bytes);
    return true;
}

bool NixlReads::on_done(uint32_t id, std::string_view body) {
    msgpack::Reader reader(body);
    uint64_t fields, status, done_bytes;
    std::string_view open, detail;
    bool inline_;
    if (!reader.array(&fields) || fields < 5 || !reader.uint(&status) || !reader.uint(&done_bytes) || !reader.bin(&open) ||
        !reader.boolean(&inline_) || !reader.str(&detail))
        return false;
    const ActiveRef active = take(id);
    if (active == nullptr) {
        if (open.empty()) clear(id);  // given up by us, and over by now
        return true;
    }
    ++reads;
    bytes_read += done_bytes;
    const bool short_of_news = done_bytes < active->landed;  // lawful for a read that failed, and no news either
    if (!short_of_news) land(*active, done_bytes);
    // Reads that need the owner's process to take part are Python's: it asks the owner for that.
    const bool lost = status == kStatusNoPeer || status == kStatusDisconnected;
    if (lost || !inline_) {
        drop_peer(active->read.node);
        events_.push({lost ? NixlReadsEvent::Kind::lost : NixlReadsEvent::Kind::not_inline, active->read.node});
    }
    Code code = Code::closed;
    if (status == kStatusOk) code = Code::ok;
    if (status == kStatusTimeout || status == kStatusCancelled) code = Code::timeout;
    if (status == kStatusBusy) code = Code::refused;
    const bool sane = code != Code::ok || (!short_of_news && active->next == active->wanted.size());
    finish(active, sane ? code : Code::closed, !sane || !open.empty(), std::string(detail).c_str());
    return sane;
}

// The first `done_bytes` bytes of the read, counted along its blocks, have landed: checksum them while they are hot.
void NixlReads::land(Active& active, uint64_t done_bytes) {
    const NixlRead& read = active.read;
    while (active.next < active.wanted.size()) {
        const uint32_t i = active.wanted[active.next];
        const auto here = static_cast<uint32_t>(std::min<uint64_t>(done_bytes - active.before, read.lengths[i]));
        if (here > active.hashed) {
            const auto* at = reinterpret_cast<const unsigned char*>(arena_ + read.offsets[i] + active.hashed);
            hash_ops().update(&active.hash, at, here - active.hashed);
            active.hashed = here;
        }
        if (here < read.lengths[i]) break;
        active.digests[i] = hash_ops().digest(&active.hash);
        if (active.digests[i] != read.from.checksums[i]) active.statuses[i] = kRejected;
        hash_ops().reset(&active.hash);
        active.before += here;
        active.hashed = 0;
        active.unreported += here;
        ++active.next;
    }
    active.landed = std::max(active.landed, done_bytes);
    if (active.unreported < partial_bytes_ || active.next == active.wanted.size()) return;
    IoEvent event;
    const size_t end = active.wanted[active.next];  // what is before it is finished, or not there
    event.first = static_cast<uint32_t>(active.reported);
    event.statuses.assign(active.statuses.begin() + active.reported, active.statuses.begin() + end);
    event.digests.assign(active.digests.begin() + active.reported, active.digests.begin() + end);
    event.bytes = active.landed;
    active.reported = end;
    active.unreported = 0;
    read.on_event(std::move(event));
}

// A part of a large block is here: the engine may copy it before the whole is proven.
void NixlReads::tell_ahead(Active& active, uint64_t done_bytes) {
    if (active.next == active.wanted.size() || done_bytes <= active.before) return;
    IoEvent event;
    event.first = active.wanted[active.next];
    event.ahead_bytes = done_bytes - active.before;
    active.read.on_event(std::move(event));
}

// Once per read. `open`: what has not come may still be written.
void NixlReads::finish(const ActiveRef& active, Code code, bool open, const char* why) {
    const NixlRead& read = active->read;
    IoEvent event;
    event.final = true;
    event.code = code;
    event.detail = why;
    event.bytes = active->landed;
    event.first = static_cast<uint32_t>(active->reported);
    const size_t end = active->next < active->wanted.size() ? active->wanted[active->next] : active->statuses.size();
    event.statuses.assign(active->statuses.begin() + active->reported, active->statuses.begin() + end);
    event.digests.assign(active->digests.begin() + active->reported, active->digests.begin() + end);
    if (open) {
        event.token = active->id;
        uint64_t bytes = 0;
        for (size_t n = active->next; n < active->wanted.size(); ++n) bytes += read.lengths[active->wanted[n]];
        held_[active->id] = bytes;
        events_.push({NixlReadsEvent::Kind::hold, active->id, bytes});
    }
    read.on_event(std::move(event));
}

// Reads that the process has not answered in time.
void NixlReads::end_late(double now) {
    std::vector<ActiveRef> late;
    {
        std::lock_guard lock(mutex_);
        for (auto it = active_.begin(); it != active_.end();) {
            if (it->second->read.deadline + kGraceS > now) {
                ++it;
                continue;
            }
            late.push_back(it->second);
            it = active_.erase(it);
        }
    }
    for (const ActiveRef& active : late) {
        events_.push({NixlReadsEvent::Kind::late, active->id});
        finish(active, Code::timeout, true, "the NIXL process did not answer in time");
    }
}

void NixlReads::clear(uint32_t id) {
    if (held_.erase(id) == 0) return;
    store_.clear(id);
    events_.push({NixlReadsEvent::Kind::clear, id});
}

void NixlReads::clear_all() {
    while (!held_.empty()) clear(held_.begin()->first);
}

}  // namespace p2pkv
