#include "gets.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

#include "frame.hpp"
#include "guard.hpp"
#include "msgpack.hpp"
#include "placement.hpp"

namespace p2pkv {
namespace {

// p2pkv/wire/engine_types.py
constexpr unsigned char kGet = 73, kGot = 74, kRelease = 75, kAhead = 79, kError = 95;
// p2pkv/types.py
constexpr unsigned char kOk = 0, kTimeout = 3, kLost = 8, kStatusMax = 9;
constexpr uint64_t kKeysMax = 16384;        // p2pkv/wire/limits.py
constexpr size_t kBodyBytesMax = 4 << 20;   // p2pkv/wire/frame.py
constexpr size_t kReceiveBytes = 64 << 10;
constexpr size_t kInFlightMax = 256;        // as p2pkv/client/channel.py
constexpr double kReleaseS = 0.05;          // a lease that is not given back expires by itself
constexpr double kFinishS = 1.0;            // a frame that has begun: finish it, or give the connection up
constexpr double kSignalsS = 0.1;
constexpr double kLookS = 0.02;             // between looks whether the agent lives, for who never asks it anything
constexpr uint64_t kAwayBytes = 4 << 20;    // so much does not stay in a cache anyway
constexpr uint64_t kUnleasedBytes = 1 << 20;  // what is copied in no time need not be held: RELEASE would take longer

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// 1: ready. 0: not in time. -1: a signal.
int wait_for(int fd, short events, double seconds) {
    pollfd watched{fd, events, 0};
    const double left = std::clamp(seconds, 0.0, 86400.0);
    const timespec timeout{static_cast<time_t>(left), static_cast<long>(std::fmod(left, 1.0) * 1e9)};
    const int ready = ppoll(&watched, 1, &timeout, nullptr);
    return ready < 0 && errno != EINTR ? 1 : ready;  // whatever else is wrong, the next call on it says so
}

}  // namespace

struct Gets::Got {
    uint64_t lease = 0, ttl_ms = 0;
    std::vector<uint32_t> indices;
    std::string_view statuses;
    std::vector<std::pair<uint64_t, uint64_t>> extents;  // offset and length
    bool more = false;
};

struct Gets::Ahead {
    uint64_t index = 0, offset = 0, length = 0;
};

// A get's place among those that wait; what comes for it too late is given back.
class Gets::Turn {
  public:
    Turn(Gets& gets, Parts* inbox) : gets_(gets), inbox_(inbox), end(gets.begin(inbox, &id)) {}
    ~Turn() {
        if (end != End::done) return;
        {
            std::lock_guard lock(gets_.mutex_);
            gets_.inboxes_.erase(id);
        }
        try {
            gets_.discard(*inbox_);
        } catch (const std::bad_alloc&) {
            // leases expire by themselves
        }
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

  private:
    Gets& gets_;
    Parts* const inbox_;

  public:
    uint32_t id = 0;
    const End end;
};

Gets::Gets(int fd, const void* arena, size_t arena_bytes, const DirectoryReader* directory, double look_s)
    : fd_(fd),
      arena_(static_cast<const unsigned char*>(arena)),
      arena_bytes_(arena_bytes),
      directory_(directory),
      look_s_(look_s) {}

double Gets::looks_here() { return many_processors() ? 0.5e-3 : 0; }

Gets::~Gets() { ::close(fd_); }

std::optional<std::string> Gets::broken() const {
    std::lock_guard lock(mutex_);
    return broken_;
}

bool Gets::lives() {
    const double now = now_s();
    if (ended_.load(std::memory_order_relaxed)) return false;
    if (now - looked_at_.load(std::memory_order_relaxed) < kLookS) return true;
    looked_at_.store(now, std::memory_order_relaxed);
    pollfd watched{fd_, POLLRDHUP, 0};
    if (poll(&watched, 1, 0) > 0) close("the agent closed it");
    return !broken();
}

void Gets::close(std::string reason) {
    std::lock_guard lock(mutex_);
    fail(std::move(reason));
}

void Gets::fail(std::string reason) {
    if (broken_) return;
    broken_ = std::move(reason);
    ended_.store(true, std::memory_order_relaxed);
    shutdown(fd_, SHUT_RDWR);  // wakes whoever sleeps on it
    arrived_.notify_all();
}

// What is in the arena is copied out by ourselves, while what is not comes. Of a chain the last key first, so that the tail
// is the one that was used earliest.
Gets::Result Gets::get(const Ask& ask, const std::function<bool()>& interrupted) {
    if (directory_ == nullptr || !lives()) return this->ask(ask, interrupted, [] {});
    std::vector<size_t> here, rest, gone;
    for (size_t i = 0; i < ask.keys.size(); ++i)
        (directory_->has(ask.space, ask.keys[i], ask.block_bytes) ? here : rest).push_back(i);
    const bool away = here.size() * ask.block_bytes > kAwayBytes;
    const auto copy_here = [&] {
        for (auto i = here.rbegin(); i != here.rend(); ++i)
            if (!directory_->copy(ask.space, ask.keys[*i], ask.buffers[*i], ask.block_bytes, away)) gone.push_back(*i);
    };
    Result out;
    out.statuses.assign(ask.keys.size(), kOk);
    const auto ask_for = [&](const std::vector<size_t>& some, bool unleased, const std::function<void()>& meanwhile) {
        Ask asked = ask;
        asked.unleased = unleased;
        asked.keys.clear();
        asked.buffers.clear();
        for (const size_t i : some) {
            asked.keys.push_back(ask.keys[i]);
            asked.buffers.push_back(ask.buffers[i]);
        }
        Result result = this->ask(asked, interrupted, meanwhile);
        for (size_t n = 0; n < some.size(); ++n) out.statuses[some[n]] = result.statuses[n];
        for (const size_t n : result.gone) gone.push_back(some[n]);
        if (out.end != End::done || result.end == End::done) return;
        out.end = result.end;
        out.detail = std::move(result.detail);
    };
    if (rest.empty()) {
        copy_here();
    } else {
        bool copied = false;
        ask_for(rest, rest.size() * ask.block_bytes <= kUnleasedBytes, [&] {
            copy_here();
            copied = true;
        });
        if (!copied) copy_here();  // nothing could be sent
    }
    if (!gone.empty()) {
        std::sort(gone.begin(), gone.end());
        ask_for(std::exchange(gone, {}), false, [] {});
    }
    return out;
}

Gets::Result Gets::ask(const Ask& ask, const std::function<bool()>& interrupted, const std::function<void()>& meanwhile) {
    Result out;
    out.statuses.assign(ask.keys.size(), kTimeout);
    const double asked_at = now_s();
    const auto end = [&](End how, std::string detail = {}) {
        out.end = how;
        out.detail = how == End::broken ? broken().value_or("") : std::move(detail);
        if (how == End::broken || how == End::busy)
            std::replace_if(out.statuses.begin(), out.statuses.end(), [](auto status) { return status != kOk; }, kLost);
        return std::move(out);
    };
    Parts inbox;
    const Turn turn(*this, &inbox);
    if (turn.end != End::done) return end(turn.end);
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(5);
    writer.uint(ask.space);
    writer.array(static_cast<uint32_t>(ask.keys.size()));
    for (const std::string_view key : ask.keys) writer.bin(key);
    writer.uint(ask.deadline_ms);
    writer.uint(current_processor());
    writer.boolean(ask.unleased);
    const End sent = send(frame::make(kGet, turn.id, body), ask.deadline, interrupted);
    if (sent != End::done) return end(sent);
    meanwhile();

    std::vector<Copied> copied(ask.keys.size());
    while (true) {
        Part part;
        if (const End how = next(&inbox, ask.deadline, interrupted, &part); how != End::done) return end(how);
        if (part.type == kError) return end(End::refused, std::move(part.body));
        if (part.type == kAhead) {
            Ahead ahead;
            if (!parse(part.body, &ahead)) {
                close("malformed AHEAD");
                return end(End::broken);
            }
            if (std::string why = complaint(ask, ahead); !why.empty()) return end(End::nonsense, std::move(why));
            copy_ahead(ask, ahead, &copied);
            continue;
        }
        Got got;
        if (!parse(part.body, &got)) {
            close("malformed GOT");
            return end(End::broken);
        }
        std::string why = complaint(ask, got);
        if (why.empty() && got.lease != 0) copy_out(ask, got, copied, &out);
        if (why.empty() && got.lease == 0) copy_unleased(ask, got, &out);
        const double held_s = now_s() - asked_at;
        if (got.lease != 0) release(got.lease);
        if (!why.empty()) return end(End::nonsense, std::move(why));
        // The agent counts ttl_ms from when the request reached it, which was after `asked_at`: if that much time has passed
        // (this process was stopped), the slots may have been reused while they were copied.
        if (got.lease != 0 && held_s >= static_cast<double>(got.ttl_ms) / 1000)
            for (size_t i = 0; i < got.indices.size(); ++i)
                if (got.statuses[i] == kOk) out.statuses[got.indices[i]] = kTimeout;
        if (!got.more) return end(End::done);
    }
}

// --- what came

bool Gets::parse(std::string_view body, Got* got) {
    msgpack::Reader reader(body);
    uint64_t fields, count;
    if (!reader.array(&fields) || fields < 7 || !reader.uint(&got->lease) || !reader.uint(&got->ttl_ms) || got->ttl_ms > UINT32_MAX)
        return false;
    if (!reader.array(&count) || count > kKeysMax || count > reader.left()) return false;
    got->indices.resize(count);
    for (uint32_t& index : got->indices) {
        uint64_t value;
        if (!reader.uint(&value) || value > UINT32_MAX) return false;
        index = static_cast<uint32_t>(value);
    }
    std::string_view sources;
    if (!reader.bin(&got->statuses) || got->statuses.size() > kKeysMax) return false;
    if (!reader.bin(&sources) || sources.size() > kKeysMax) return false;
    if (!reader.array(&count) || count > kKeysMax || count > reader.left()) return false;
    got->extents.resize(count);
    for (auto& [offset, length] : got->extents) {
        uint64_t parts;
        if (!reader.array(&parts) || parts < 2 || !reader.uint(&offset) || !reader.uint(&length) || !reader.skip(parts - 2))
            return false;
    }
    return reader.boolean(&got->more) && reader.skip(fields - 7) && reader.at_end();
}

// Why this is no answer to that; empty if it is one.
std::string Gets::complaint(const Ask& ask, const Got& got) const {
    if (got.statuses.size() != got.indices.size() || got.extents.size() != got.indices.size())
        return "the parts of the agent's answer differ in length";
    for (size_t i = 0; i < got.indices.size(); ++i) {
        const auto status = static_cast<unsigned char>(got.statuses[i]);
        if (got.indices[i] >= ask.keys.size() || status > kStatusMax) return "the agent tells of a block that nobody asked for";
        const auto [offset, length] = got.extents[i];
        if (status == kOk && (length != ask.block_bytes || length > arena_bytes_ || offset > arena_bytes_ - length))
            return "the agent says that a block is where it cannot be";
        if (status == kOk && got.lease == 0 && !ask.unleased) return "the agent says that a block is here, and does not hold it";
    }
    return {};
}

bool Gets::parse(std::string_view body, Ahead* ahead) {
    msgpack::Reader reader(body);
    uint64_t fields;
    return reader.array(&fields) && fields >= 3 && reader.uint(&ahead->index) && ahead->index <= UINT32_MAX &&
           reader.uint(&ahead->offset) && reader.uint(&ahead->length) && reader.skip(fields - 3) && reader.at_end();
}

std::string Gets::complaint(const Ask& ask, const Ahead& ahead) const {
    if (ahead.length == 0) return {};
    if (ahead.index < ask.keys.size() && ahead.length <= std::min<uint64_t>(ask.block_bytes, arena_bytes_) &&
        ahead.offset <= arena_bytes_ - ahead.length)
        return {};
    return "the agent tells of bytes that nobody asked for";
}

// Copy what has landed of a block and is not proven yet.
void Gets::copy_ahead(const Ask& ask, const Ahead& ahead, std::vector<Copied>* copied) const {
    if (ahead.length == 0) {  // all that was told ahead has failed
        copied->assign(copied->size(), Copied{});
        return;
    }
    Copied& known = (*copied)[ahead.index];
    if (known.offset != ahead.offset) known = {ahead.offset, 0};
    if (known.done >= ahead.length) return;
    if (guarded_copy(ask.buffers[ahead.index] + known.done, arena_ + ahead.offset + known.done, ahead.length - known.done,
                     CopyDeadline::max()))
        known.done = ahead.length;
}

void Gets::copy_out(const Ask& ask, const Got& got, const std::vector<Copied>& copied, Result* out) const {
    for (size_t i = 0; i < got.indices.size(); ++i) {
        const uint32_t index = got.indices[i];
        auto status = static_cast<unsigned char>(got.statuses[i]);
        if (status == kOk) {
            const auto [offset, length] = got.extents[i];
            const uint64_t done = copied[index].offset == offset ? copied[index].done : 0;
            if (!guarded_copy(ask.buffers[index] + done, arena_ + offset + done, length - done, CopyDeadline::max()))
                status = kLost;
        }
        out->statuses[index] = status;
    }
}

// What nobody holds for us, and may go at any time: the last key first, as in get().
void Gets::copy_unleased(const Ask& ask, const Got& got, Result* out) const {
    for (size_t i = got.indices.size(); i-- > 0;) {
        const uint32_t index = got.indices[i];
        auto status = static_cast<unsigned char>(got.statuses[i]);
        const bool here = status == kOk &&
                          directory_->copy(ask.space, ask.keys[index], ask.buffers[index], ask.block_bytes, false, false);
        if (status == kOk && !here) {
            status = kLost;
            out->gone.push_back(index);
        }
        out->statuses[index] = status;
    }
}

// --- the socket

Gets::End Gets::begin(Parts* inbox, uint32_t* id) {
    std::lock_guard lock(mutex_);
    if (broken_) return End::broken;
    if (inboxes_.size() >= kInFlightMax) return End::busy;
    do *id = ++last_id_;
    while (*id == 0 || inboxes_.contains(*id));
    inboxes_.emplace(*id, inbox);
    return End::done;
}

// Wait for the next part of an answer.
Gets::End Gets::next(Parts* inbox, double deadline, const std::function<bool()>& interrupted, Part* part) {
    double look_at = now_s() + kSignalsS;
    std::unique_lock lock(mutex_);
    while (true) {
        if (!inbox->empty()) {
            *part = std::move(inbox->front());
            inbox->pop_front();
            return End::done;
        }
        if (broken_) return End::broken;
        const double left = deadline - now_s();
        if (left <= 0) return End::late;
        bool look = false;  // a signal has come, or may have come just before we slept
        Parts unwanted;
        if (reading_) {
            const std::chrono::duration<double> most(std::min(left, kSignalsS));
            look = arrived_.wait_for(lock, most) == std::cv_status::timeout;
        } else {
            reading_ = true;
            lock.unlock();
            try {
                look = !read_once(std::min(left, kSignalsS), &unwanted);
            } catch (const std::bad_alloc&) {
                close("out of memory");
            }
            lock.lock();
            reading_ = false;
            if (inboxes_.size() > 1) arrived_.notify_all();
        }
        look = look || now_s() >= look_at;  // others' answers may come all the time
        if (!look && unwanted.empty()) continue;
        lock.unlock();
        discard(unwanted);
        if (look && interrupted()) return End::interrupted;
        if (look) look_at = now_s() + kSignalsS;
        lock.lock();
    }
}

// As the one who reads: wait for bytes, take them in, hand them out. False: none came.
bool Gets::read_once(double seconds, Parts* unwanted) {
    static thread_local std::vector<char> buffer(kReceiveBytes);
    const auto receive = [&] { return recv(fd_, buffer.data(), buffer.size(), MSG_DONTWAIT); };
    ssize_t n = -1;
    errno = EAGAIN;
    for (const double until = now_s() + std::min(look_s_, seconds); n < 0 && errno == EAGAIN && now_s() < until;) n = receive();
    if (n < 0 && errno == EAGAIN) {
        if (wait_for(fd_, POLLIN, seconds) <= 0) return false;
        n = receive();
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (n <= 0) {
        close(n == 0 ? "the agent closed it" : std::strerror(errno));
    } else {
        dispatch({buffer.data(), static_cast<size_t>(n)}, unwanted);
    }
    return true;
}

// `unwanted`: answers that nobody waits for any more.
void Gets::dispatch(std::string_view data, Parts* unwanted) {
    std::lock_guard lock(mutex_);
    in_.append(data);
    size_t at = 0;
    while (!broken_ && in_.size() - at >= frame::kHeaderBytes) {
        const frame::Header header = frame::parse(in_.data() + at);
        if (header.version != frame::kVersion || header.length > kBodyBytesMax ||
            (header.type != kGot && header.type != kAhead && header.type != kError)) {
            fail("what the agent says is no answer to a get");
            break;
        }
        if (in_.size() - at - frame::kHeaderBytes < header.length) break;
        Part part{header.type, in_.substr(at + frame::kHeaderBytes, header.length)};
        at += frame::kHeaderBytes + header.length;
        const auto inbox = inboxes_.find(header.request_id);
        (inbox == inboxes_.end() ? *unwanted : *inbox->second).push_back(std::move(part));
    }
    in_.erase(0, at);
}

// Send a whole frame. One that was sent in part and cannot be finished breaks the connection.
Gets::End Gets::send(std::string_view frame, double deadline, const std::function<bool()>& interrupted) {
    std::unique_lock lock(send_mutex_, std::defer_lock);
    while (!lock.try_lock_for(std::chrono::duration<double>(std::clamp(deadline - now_s(), 0.0, kSignalsS)))) {
        if (now_s() >= deadline) return End::busy;
        if (interrupted()) return End::interrupted;
    }
    size_t sent = 0;
    while (sent < frame.size()) {
        const ssize_t n = ::send(fd_, frame.data() + sent, frame.size() - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0) {
            if (sent == 0) deadline = std::max(deadline, now_s() + kFinishS);
            sent += static_cast<size_t>(n);
            continue;
        }
        if (errno == EINTR) continue;
        if (errno != EAGAIN) {
            close(std::string("send failed: ") + std::strerror(errno));
            return End::broken;
        }
        End why = End::busy;
        if (const double left = deadline - now_s(); left > 0) {
            if (wait_for(fd_, POLLOUT, std::min(left, kSignalsS)) > 0 || !interrupted()) continue;
            why = End::interrupted;
        }
        if (sent == 0) return why;
        close("the agent stopped reading in the middle of a request");
        return why == End::interrupted ? why : End::broken;
    }
    return End::done;
}

Gets::End Gets::release(uint64_t lease) {
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(1);
    writer.uint(lease);
    return send(frame::make(kRelease, 0, body), now_s() + kReleaseS, [] { return false; });
}

// Answers that nobody waits for any more: blocks that they hold are given back, unless the agent does not read.
void Gets::discard(const Parts& parts) {
    for (const Part& part : parts) {
        Got got;
        if (part.type == kGot && parse(part.body, &got) && got.lease != 0 && release(got.lease) != End::done) return;
    }
}

}  // namespace p2pkv
