#include "transfer.hpp"

#include <sched.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "frame.hpp"
#include "requests.hpp"

namespace p2pkv {
namespace {

constexpr size_t kRefusalBytesMax = 8192;
constexpr size_t kPiece = 256 << 10;       // hashed while still in L2
constexpr uint64_t kTurnBytes = 4 << 20;   // then another transfer of this thread gets its turn
constexpr size_t kSendfileBytes = 1 << 20;
constexpr auto kPinLook = std::chrono::microseconds(150);
constexpr auto kReceiveLook = std::chrono::microseconds(150);  // without a byte; waking another thread costs 20 to 50
constexpr auto kReceiveLookMost = std::chrono::milliseconds(4);  // in all: a block that trickles is the I/O thread's
constexpr uint64_t kBeginBytes = 256 << 10;  // some 30 us of the event loop's time; waking a thread costs as much

uint32_t load32(const unsigned char* p) {
    uint32_t v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

uint64_t load64(const unsigned char* p) {
    uint64_t v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// A record's status and checksum. False: the block is not as long as its layout says.
bool read_record(const unsigned char* record, uint32_t expected_length, unsigned char* status, Digest* checksum) {
    *status = record[0];
    std::memcpy(checksum->data(), record + 16, checksum->size());
    return load32(record + 4) == (*status == kOk ? expected_length : 0);
}

constexpr const char* kWrongLength = "a block is not as long as its layout says";

}  // namespace

Transfer::Want Transfer::on_errno(Want when_it_would_block) {
    if (errno == EAGAIN || errno == EWOULDBLOCK) return when_it_would_block;
    return fail(Code::closed, std::strerror(errno));
}

void Transfer::tell_news() {
    IoEvent partial, ahead;
    if (take_partial(&partial)) {
        partial.job = job;
        on_event(std::move(partial));
    }
    if (take_ahead(&ahead)) {
        ahead.job = job;
        on_event(std::move(ahead));
    }
}

Asking::Asking(uint64_t job, int fd, Limits limits, std::string request, size_t body_bytes)
    : Transfer(job, fd, limits),
      request_(std::move(request)),
      frame_(frame::kHeaderBytes + body_bytes),
      frame_wanted_(frame::kHeaderBytes) {}

Transfer::Want Asking::step() {
    if (state_ == State::request) {
        const Want want = send_request();
        if (state_ == State::request) return want;
    }
    while (state_ != State::answered) {
        const State before = state_;
        const Want want = read_frame();
        if (state_ == before || want == Want::done) return want;
    }
    return go_on();
}

Transfer::Want Asking::send_request() {
    while (sent_ < request_.size()) {
        const ssize_t n = send(fd, request_.data() + sent_, request_.size() - sent_, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return on_errno(Want::write);
        sent_ += static_cast<size_t>(n);
        last_progress = Clock::now();
    }
    state_ = State::header;
    return Want::read;
}

// Reads what is wanted of the frame; when it is here, moves on to the next state.
Transfer::Want Asking::read_frame() {
    while (frame_got_ < frame_wanted_) {
        const ssize_t n = recv(fd, frame_.data() + frame_got_, frame_.size() - frame_got_, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) return fail(Code::closed, "the peer closed the connection");
        if (n < 0) return on_errno(Want::read);
        frame_got_ += static_cast<size_t>(n);
        last_progress = Clock::now();
        if (!begun) first_byte_at_ = last_progress;
        begun = true;
    }
    if (state_ == State::header) return on_header();
    const auto body = std::span<const unsigned char>(frame_).subspan(frame::kHeaderBytes);
    if (state_ == State::refusal) return fail(Code::refused, std::string(body.begin(), body.end()));
    state_ = State::answered;
    return on_answer(body);
}

Transfer::Want Asking::on_header() {
    const frame::Header header = frame::parse(frame_.data());
    if (header.version != frame::kVersion) return fail(Code::protocol, "frame of another version");
    if (header.type == kTypeError && header.length <= kRefusalBytesMax) {
        state_ = State::refusal;
    } else if (expects(header.type, header.length)) {
        state_ = State::body;
    } else {
        return fail(Code::protocol, "not an answer to what was asked");
    }
    frame_wanted_ = frame::kHeaderBytes + header.length;
    if (frame_got_ > frame_wanted_) return fail(Code::protocol, "more than an answer to what was asked");
    frame_.resize(frame_wanted_);
    return Want::read;
}

double Asking::waited_s() const {
    return begun ? std::chrono::duration<double>(first_byte_at_ - started).count() : 0;
}

Receive::Receive(uint64_t job, int fd, Limits limits, std::string request, std::vector<Destination> blocks,
                 uint64_t partial_bytes, uint64_t ahead_bytes)
    : Asking(job, fd, limits, std::move(request), blocks.size() * kGotRecordBytes),
      blocks_(std::move(blocks)),
      partial_bytes_(partial_bytes),
      ahead_bytes_(ahead_bytes),
      statuses_(blocks_.size(), 1),
      expected_(blocks_.size()),
      digests_(blocks_.size()) {}

Transfer::Want Receive::begin() {
    Want want = Asking::begin();
    if (!look) return want;
    const auto until = std::min(limits.deadline, started + kReceiveLookMost);
    auto heard = Clock::now();  // not last_progress: the owner may have run here, in front of us, since the request went out
    while (want == Want::read && Clock::now() < std::min(until, heard + kReceiveLook) && look()) {
        const auto before = last_progress;
        sched_yield();
        want = step();
        if (last_progress != before) heard = Clock::now();
        if (want != Want::done) tell_news();
    }
    return want;
}

bool Receive::expects(unsigned char type, size_t body_bytes) const {
    return type == kTypeGot && body_bytes == blocks_.size() * kGotRecordBytes;
}

Transfer::Want Receive::on_answer(std::span<const unsigned char> records) {
    for (size_t i = 0; i < blocks_.size(); ++i)
        if (!read_record(records.data() + i * kGotRecordBytes, blocks_[i].length, &statuses_[i], &expected_[i]))
            return fail(Code::protocol, kWrongLength);
    hash_ops().reset(&hash_);
    return Want::read;
}

// Skips blocks that the owner does not have; true while there is one to receive.
bool Receive::next_block() {
    while (block_ < blocks_.size() && (statuses_[block_] != kOk || blocks_[block_].length == 0)) ++block_;
    return block_ < blocks_.size();
}

Transfer::Want Receive::go_on() {
    uint64_t turn = 0;
    while (next_block()) {
        if (turn >= kTurnBytes || unreported_ >= partial_bytes_ || ahead()) return Want::read;
        const Destination& block = blocks_[block_];
        unsigned char* at = block.address + block_got_;
        const ssize_t n = recv(fd, at, std::min(kPiece, block.length - block_got_), MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) return fail(Code::closed, "the peer closed the connection in the middle of an answer");
        if (n < 0) return on_errno(Want::read);
        const auto got = static_cast<size_t>(n);
        hash_ops().update(&hash_, at, got);
        block_got_ += got;
        bytes_ += got;
        turn += got;
        last_progress = Clock::now();
        if (block_got_ == block.length) {
            digests_[block_] = hash_ops().digest(&hash_);
            if (digests_[block_] != expected_[block_]) statuses_[block_] = kRejected;
            unreported_ += block.length;
            ++block_;
            block_got_ = told_ahead_ = 0;
            hash_ops().reset(&hash_);
        }
    }
    return Want::done;
}

void Receive::report(IoEvent* event) {
    event->first = static_cast<uint32_t>(reported_);
    event->statuses.assign(statuses_.begin() + reported_, statuses_.begin() + block_);
    event->digests.assign(digests_.begin() + reported_, digests_.begin() + block_);
    event->bytes = bytes_;
    event->waited_s = waited_s();
    reported_ = block_;
    unreported_ = 0;
}

bool Receive::take_partial(IoEvent* event) {
    if (unreported_ < partial_bytes_ || block_ >= blocks_.size()) return false;
    report(event);
    return true;
}

bool Receive::ahead() const {
    return ahead_bytes_ != 0 && block_got_ - told_ahead_ >= ahead_bytes_ &&
           blocks_[block_].length - block_got_ >= ahead_bytes_ / 2;  // else the end is as near as the news
}

bool Receive::take_ahead(IoEvent* event) {
    if (block_ >= blocks_.size() || !ahead()) return false;
    event->first = static_cast<uint32_t>(block_);
    event->ahead_bytes = told_ahead_ = block_got_;
    return true;
}

// Blocks from `block_` on did not arrive whole: they are not in the report, which says how far it goes.
void Receive::fill_final(IoEvent* event) { report(event); }

Pin::Pin(uint64_t job, int fd, Limits limits, std::string request, std::vector<uint32_t> lengths,
         std::shared_ptr<PinAnswer> out)
    : Asking(job, fd, limits, std::move(request), kPinnedFixedBytes + lengths.size() * kPinnedRecordBytes),
      lengths_(std::move(lengths)),
      out_(std::move(out)) {}

Transfer::Want Pin::begin() {
    Want want = Asking::begin();
    const auto until = Clock::now() + kPinLook;
    while (want == Want::read && Clock::now() < until) {
        sched_yield();
        want = step();
    }
    return want;
}

bool Pin::expects(unsigned char type, size_t body_bytes) const {
    const size_t least = kPinnedFixedBytes + lengths_.size() * kPinnedRecordBytes;
    return type == kTypePinned && body_bytes >= least && body_bytes <= least + kEndpointBytesMax;
}

Transfer::Want Pin::on_answer(std::span<const unsigned char> body) {
    const size_t name_bytes = load32(body.data() + 4), count = lengths_.size();
    if (body.size() != kPinnedFixedBytes + name_bytes + count * kPinnedRecordBytes) return fail(Code::protocol, "malformed PINNED");
    out_->ttl_s = load32(body.data()) / 1e3;
    out_->endpoint.assign(reinterpret_cast<const char*>(body.data()) + kPinnedFixedBytes, name_bytes);
    out_->statuses.resize(count);
    out_->offsets.resize(count);
    out_->checksums.resize(count);
    const unsigned char* record = body.data() + kPinnedFixedBytes + name_bytes;
    for (size_t i = 0; i < count; ++i, record += kPinnedRecordBytes) {
        if (!read_record(record, lengths_[i], &out_->statuses[i], &out_->checksums[i]))
            return fail(Code::protocol, kWrongLength);
        out_->offsets[i] = load64(record + kGotRecordBytes);
    }
    return Want::read;
}

Send::Send(uint64_t job, int fd, Limits limits, std::string header, int file, const unsigned char* mapping,
           std::vector<FileRun> runs)
    : Transfer(job, fd, limits), header_(std::move(header)), file_(file), mapping_(mapping), runs_(std::move(runs)) {
    begun = true;  // nothing is waited for but room in the socket
}

Transfer::Want Send::begin() { return send_up_to(kBeginBytes); }

Transfer::Want Send::step() { return send_up_to(kTurnBytes); }

Transfer::Want Send::send_up_to(uint64_t bytes) {
    uint64_t turn = 0;
    while (header_sent_ < header_.size()) {
        const size_t left = header_.size() - header_sent_;
        iovec parts[2] = {{header_.data() + header_sent_, left}, {nullptr, 0}};
        if (mapping_ != nullptr && !runs_.empty()) {  // with what follows, in one system call
            const size_t piece = std::min<uint64_t>({kSendfileBytes, bytes, runs_[0].length});
            parts[1] = {const_cast<unsigned char*>(mapping_) + runs_[0].offset, piece};
        }
        msghdr message{};
        message.msg_iov = parts;
        message.msg_iovlen = parts[1].iov_len != 0 ? 2 : 1;
        const bool more = !runs_.empty() && message.msg_iovlen == 1;
        const ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT | (more ? MSG_MORE : 0));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return on_errno(Want::write);
        const size_t of_header = std::min(left, static_cast<size_t>(n));
        header_sent_ += of_header;
        run_sent_ += static_cast<size_t>(n) - of_header;
        bytes_ += static_cast<size_t>(n) - of_header;
        turn += static_cast<size_t>(n) - of_header;
        last_progress = Clock::now();
    }
    while (run_ < runs_.size()) {
        const FileRun& run = runs_[run_];
        if (run_sent_ == run.length) {
            ++run_;
            run_sent_ = 0;
            continue;
        }
        if (turn >= bytes) return Want::write;
        const size_t piece = std::min<uint64_t>({kSendfileBytes, bytes - turn, run.length - run_sent_});
        off_t offset = static_cast<off_t>(run.offset + run_sent_);
        const ssize_t n = mapping_ != nullptr ? send(fd, mapping_ + offset, piece, MSG_NOSIGNAL | MSG_DONTWAIT)
                                              : sendfile(fd, file_, &offset, piece);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return on_errno(Want::write);
        if (n == 0) return fail(Code::protocol, "a run lies behind the end of the arena");
        run_sent_ += static_cast<uint64_t>(n);
        bytes_ += static_cast<uint64_t>(n);
        turn += static_cast<uint64_t>(n);
        last_progress = Clock::now();
    }
    return Want::done;
}

}  // namespace p2pkv
