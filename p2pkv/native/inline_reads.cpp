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
// A large block is read in such parts, so that its reader can begin with it early. So can the reader of several where the
// first piece is no larger, and none more than all before it: while that is read there is as much to work on.
constexpr uint64_t kPartBytes = 1 << 20;
constexpr uint64_t kPage = 4096;
constexpr size_t kPiecesAhead = 12;

// nixl_status_t
constexpr long kSuccess = 0, kInProgress = 1;

// Of a request that was posted. Throws for any other status: the bindings raise for those that they know.
bool has_ended(nb::handle status) {
    const nb::object number = nb::steal(PyNumber_Index(status.ptr()));
    if (!number.is_valid()) throw nb::python_error();
    const long value = PyLong_AsLong(number.ptr());
    if (value != kSuccess && value != kInProgress) {
        PyErr_SetString(PyExc_ValueError, "NIXL reports an error without a reason");
        throw nb::python_error();
    }
    return value == kSuccess;
}

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

InlineReads::InlineReads(int fd, int bell, NixlCalls calls, uintptr_t base, uint64_t bytes)
    : fd_(fd), bell_(bell), calls_(std::move(calls)), base_(base), bytes_(bytes) {}

void InlineReads::add_peer(std::string name, uint64_t base, uint64_t bytes) {
    peers_.insert_or_assign(std::move(name), Peer{base, bytes});
}

void InlineReads::remove_peer(const std::string& name) {
    peers_.erase(name);
    for (const ReadRef& read : active_)
        if (read->peer == name) release(*read);  // before NIXL forgets the peer
}

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
uint64_t InlineReads::room(const Read& read, const Place& at) {
    const uint64_t left = read.total - at.done;
    if (left <= kTailBytes) return read.piece_bytes;
    const uint64_t of_run = read.runs[at.run].length - at.offset;
    const uint64_t grown = std::max(kPartBytes, at.done);
    return std::min({read.piece_bytes, grown, left / 2 / kPage * kPage, of_run > kPartBytes ? kPartBytes : left});
}

// The piece from `at` on: whole runs, or a part of one that is too long. Returns where it ends.
InlineReads::Place InlineReads::cut(const Read& read, Place at, nb::list* local, nb::list* remote) const {
    const uint64_t most = room(read, at);
    uint64_t length = 0;
    while (at.run < read.runs.size() && nb::len(*local) < kPieceRunsMax) {
        const Run& next = read.runs[at.run];
        const uint64_t take = std::min(next.length - at.offset, most - length);
        if (take == 0 || (take < next.length - at.offset && length != 0)) break;
        local->append(nb::make_tuple(next.local + at.offset, take, 0));
        remote->append(nb::make_tuple(next.remote + at.offset, take, 0));
        length += take;
        at.offset += take;
        if (at.offset < next.length) break;
        ++at.run;
        at.offset = 0;
    }
    at.done += length;
    return at;
}

// Have NIXL make the requests of the next pieces, while what that takes is in the processor's caches: a piece that is read
// drives it out, and then one request costs as much as eight of these. Why there is none, if there is none.
nb::object InlineReads::prepare(Read& read) {
    Place at = read.at;
    while (at.done < read.total && read.prepared.size() < kPiecesAhead) {
        nb::list local, remote;
        const Place end = cut(read, at, &local, &remote);
        try {
            nb::object handle = calls_.create(calls_.descriptors(local), calls_.descriptors(remote), read.peer.c_str());
            read.prepared.push_back({std::move(handle), end});
        } catch (nb::python_error& raised) {
            if (read.prepared.empty()) return nb::borrow<nb::object>(raised.value());
            break;  // it is tried again when it is its turn
        }
        at = end;
    }
    return nb::none();
}

// Give back to NIXL whatever it keeps for a read.
void InlineReads::release(Read& read) {
    for (Piece& piece : read.prepared) read.used.push_back(std::move(piece.handle));
    read.prepared.clear();
    for (const nb::object& handle : read.used) {
        try {
            calls_.release(handle);
        } catch (nb::python_error&) {
            // there is nothing more that could be done with it
        }
    }
    read.used.clear();
}

void InlineReads::hand_over(Read& read, nb::object handle, uint64_t length, nb::object error, nb::list* handed_over) {
    release(read);
    handed_over->append(
        nb::make_tuple(read.id, nb::bytes(read.body.data(), read.body.size()), read.at.done, handle, length, error));
}

// One piece of the read that has waited longest.
void InlineReads::step(nb::list* handed_over) {
    ReadRef read = std::move(active_.front());
    active_.pop_front();
    if (now_s() >= read->deadline) {
        tell_done(*read, kStatusTimeout);
        return release(*read);
    }
    if (!peers_.contains(read->peer)) return hand_over(*read, nb::none(), 0, nb::none(), handed_over);
    if (read->prepared.empty()) {
        nb::object error = prepare(*read);
        if (read->prepared.empty()) return hand_over(*read, nb::none(), 0, error, handed_over);
    }
    const Piece piece = std::move(read->prepared.front());
    read->prepared.pop_front();
    const uint64_t length = piece.end.done - read->at.done;
    bool ended = false;
    nb::object error = nb::none();
    try {
        ended = has_ended(calls_.post(piece.handle));
    } catch (nb::python_error& raised) {
        error = nb::borrow<nb::object>(raised.value());
    }
    if (!ended) return hand_over(*read, piece.handle, length, error, handed_over);
    read->used.push_back(piece.handle);
    read->at = piece.end;
    bytes_read_ += length;
    if (read->at.done == read->total) {
        tell_done(*read, kStatusOk);
        return release(*read);
    }
    tell_progress(*read);
    active_.push_back(std::move(read));
}

void InlineReads::tell_progress(Read& read) {
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(1);
    writer.uint(read.at.done);
    send(frame::make(kProgress, read.id, body));
}

void InlineReads::tell_done(Read& read, uint64_t status) {
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(5);
    writer.uint(status);
    writer.uint(read.at.done);
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
