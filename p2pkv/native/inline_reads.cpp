#include "inline_reads.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "frame.hpp"
#include "msgpack.hpp"

namespace nb = nanobind;

namespace p2pkv {
namespace {

// p2pkv/transport/nixl_wire.py
constexpr unsigned char kRead = 6, kProgress = 7, kDone = 8;
constexpr uint64_t kStatusOk = 0, kStatusTimeout = 2;
constexpr size_t kRunBytes = 24, kRunsMax = 16384;
constexpr size_t kBodyBytesMax = kRunBytes * kRunsMax + 4096;
constexpr size_t kReceiveBytes = 64 << 10;
constexpr size_t kOutBytesMax = 8 << 20;  // answers that the agent does not take: it hangs
constexpr size_t kPieceRunsMax = 128;
constexpr size_t kReadsMax = 1024;
constexpr uint64_t kPieceBytesMin = 256 << 10, kPieceBytesMax = 8 << 20;
// Whoever hears of progress works on a piece about half as long as it takes to read it. So towards the end each piece is
// half of what is left, and little remains to be done after the last.
constexpr uint64_t kTailBytes = 512 << 10;
// A large block is read in such parts, so that its reader can begin with it early.
constexpr uint64_t kPartBytes = 1 << 20;
constexpr uint64_t kPage = 4096;

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

InlineReads::InlineReads(int fd, int bell, NixlCalls calls, uintptr_t base, uint64_t bytes)
    : fd_(fd), bell_(bell), calls_(std::move(calls)), base_(base), bytes_(bytes) {}

void InlineReads::add_peer(std::string name, uint64_t base, uint64_t bytes) {
    peers_.insert_or_assign(std::move(name), Peer{base, bytes});
}

void InlineReads::remove_peer(const std::string& name) { peers_.erase(name); }

nb::tuple InlineReads::serve(double seconds, int other_fd, bool other_full, int pieces) {
    nb::list handed_over;
    double left = active_.empty() ? seconds : 0;
    while (true) {
        pollfd watched[2] = {{fd_, static_cast<short>(out_.empty() ? POLLIN : POLLIN | POLLOUT), 0},
                             {other_fd, static_cast<short>(other_full ? POLLIN | POLLOUT : POLLIN), 0}};
        {
            nb::gil_scoped_release release;
            const timespec timeout{static_cast<time_t>(left), static_cast<long>(std::fmod(left, 1.0) * 1e9)};
            if (ppoll(watched, 2, &timeout, nullptr) < 0) watched[0].revents = watched[1].revents = 0;  // a signal
        }
        if (watched[0].revents & POLLOUT) flush();
        if (watched[0].revents & ~POLLOUT) receive(&handed_over);
        if (!active_.empty()) step(&handed_over);
        if (active_.empty() || --pieces <= 0 || watched[1].revents != 0 || nb::len(handed_over) > 0)
            return nb::make_tuple(handed_over, watched[1].revents != 0);
        left = 0;
    }
}

void InlineReads::receive(nb::list* handed_over) {
    static thread_local std::vector<char> buffer(kReceiveBytes);
    const ssize_t n = recv(fd_, buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) throw std::runtime_error("closed");
    in_.append(buffer.data(), static_cast<size_t>(n));
    size_t at = 0;
    while (in_.size() - at >= frame::kHeaderBytes) {
        const frame::Header header = frame::parse(in_.data() + at);
        if (header.version != frame::kVersion || header.type != kRead || header.length > kBodyBytesMax)
            throw std::runtime_error("what came on the second socket is no READ");
        if (in_.size() - at - frame::kHeaderBytes < header.length) break;
        const std::string_view body(in_.data() + at + frame::kHeaderBytes, header.length);
        at += frame::kHeaderBytes + header.length;
        if (ReadRef read = parse(header.request_id, body)) {
            active_.push_back(std::move(read));
        } else {
            handed_over->append(
                nb::make_tuple(header.request_id, nb::bytes(body.data(), body.size()), 0, nb::none(), 0, nb::none()));
        }
    }
    in_.erase(0, at);
}

// Null: the engine has to look at it.
InlineReads::ReadRef InlineReads::parse(uint32_t id, std::string_view body) const {
    msgpack::Reader reader(body);
    uint64_t fields, piece_bytes, deadline_ns;
    std::string_view peer, runs;
    if (!reader.array(&fields) || fields != 4 || !reader.str(&peer) || !reader.bin(&runs) || !reader.uint(&piece_bytes) ||
        !reader.uint(&deadline_ns) || !reader.at_end())
        return nullptr;
    const auto known = peers_.find(peer);
    const size_t count = runs.size() / kRunBytes;
    if (piece_bytes == 0 || known == peers_.end() || active_.size() >= kReadsMax || count == 0 || count > kRunsMax || runs.size() % kRunBytes)
        return nullptr;
    auto read = std::make_unique<Read>();
    read->id = id;
    read->peer = peer;
    read->body = body;
    read->piece_bytes = std::clamp(piece_bytes, kPieceBytesMin, kPieceBytesMax);
    read->deadline = static_cast<double>(deadline_ns) / 1e9;
    read->runs.resize(count);
    std::memcpy(read->runs.data(), runs.data(), runs.size());
    for (Run& run : read->runs) {
        const auto inside = [&run](uint64_t offset, uint64_t bytes) { return offset <= bytes && run.length <= bytes - offset; };
        if (run.length == 0 || !inside(run.remote, known->second.bytes) || !inside(run.local, bytes_)) return nullptr;
        run.remote += known->second.base;
        run.local += base_;
        read->total += run.length;
    }
    return read;
}

// The next piece's bytes, at most.
uint64_t InlineReads::room(const Read& read) const {
    const uint64_t left = read.total - read.done;
    if (left <= kTailBytes) return read.piece_bytes;
    const uint64_t of_run = read.runs[read.run].length - read.offset;
    return std::min({read.piece_bytes, left / 2 / kPage * kPage, of_run > kPartBytes ? kPartBytes : left});
}

// One piece of the read that has waited longest.
void InlineReads::step(nb::list* handed_over) {
    ReadRef read = std::move(active_.front());
    active_.pop_front();
    if (now_s() >= read->deadline) return tell_done(*read, kStatusTimeout);
    if (!peers_.contains(read->peer)) {
        handed_over->append(nb::make_tuple(read->id, nb::bytes(read->body.data(), read->body.size()), read->done, nb::none(), 0,
                                           nb::none()));
        return;
    }
    const uint64_t most = room(*read);
    nb::list local, remote;
    uint64_t length = 0;
    size_t run = read->run;
    uint64_t offset = read->offset;
    // Whole runs, or a part of one that is too long.
    while (run < read->runs.size() && nb::len(local) < kPieceRunsMax) {
        const Run& next = read->runs[run];
        const uint64_t take = std::min(next.length - offset, most - length);
        if (take == 0 || (take < next.length - offset && length != 0)) break;
        local.append(nb::make_tuple(next.local + offset, take, 0));
        remote.append(nb::make_tuple(next.remote + offset, take, 0));
        length += take;
        offset += take;
        if (offset < next.length) break;
        ++run;
        offset = 0;
    }
    nb::object handle = nb::none(), error = nb::none();
    bool ended = false;
    try {
        handle = calls_.create(calls_.descriptors(local), calls_.descriptors(remote), read->peer.c_str());
        ended = nb::cast<bool>(calls_.post(handle));
        if (ended) calls_.release(handle);
    } catch (nb::python_error& raised) {
        error = nb::borrow<nb::object>(raised.value());
    }
    if (!ended) {
        handed_over->append(nb::make_tuple(read->id, nb::bytes(read->body.data(), read->body.size()), read->done, handle,
                                           handle.is_none() ? 0 : length, error));
        return;
    }
    read->run = run;
    read->offset = offset;
    read->done += length;
    bytes_read_ += length;
    if (read->done == read->total) return tell_done(*read, kStatusOk);
    tell_progress(*read);
    active_.push_back(std::move(read));
}

void InlineReads::tell_progress(Read& read) {
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(1);
    writer.uint(read.done);
    send(frame::make(kProgress, read.id, body));
}

void InlineReads::tell_done(Read& read, uint64_t status) {
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(5);
    writer.uint(status);
    writer.uint(read.done);
    writer.bin({});  // nothing is left that could still be written
    writer.boolean(true);
    writer.str({});
    ++reads_;
    send(frame::make(kDone, read.id, body));
}

void InlineReads::send(std::string frame) {
    if (out_.empty()) {
        const ssize_t n = ::send(fd_, frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN && errno != EINTR) throw std::runtime_error("closed");
        if (n > 0) frame.erase(0, static_cast<size_t>(n));
    }
    ring();
    out_ += frame;
    if (out_.size() > kOutBytesMax) throw std::runtime_error("the agent does not read its answers");
}

void InlineReads::flush() {
    const ssize_t n = ::send(fd_, out_.data(), out_.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN && errno != EINTR) throw std::runtime_error("closed");
    if (n > 0) out_.erase(0, static_cast<size_t>(n));
    ring();
}

void InlineReads::ring() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(bell_, &one, sizeof one);
}

}  // namespace p2pkv
