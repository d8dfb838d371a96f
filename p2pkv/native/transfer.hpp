// One exchange on one non-blocking socket, as a state machine that a single I/O thread steps.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "hash.hpp"

namespace p2pkv {

using Clock = std::chrono::steady_clock;

// How a transfer ended; p2pkv/transport/native.py mirrors these numbers.
enum class Code : int {
    ok = 0,
    timeout = 1,    // the deadline passed
    stalled = 2,    // no byte moved for the stall time
    closed = 3,     // the other side closed or reset the connection
    protocol = 4,   // what came is not what the protocol allows
    cancelled = 5,  // cancel() or stop()
    refused = 6,    // the owner answered ERROR; `detail` is its msgpack body
};

// Status bytes per block, as in p2pkv.types.Status.
constexpr unsigned char kOk = 0;
constexpr unsigned char kRejected = 2;

struct IoEvent {
    uint64_t job = 0;
    bool final = false;
    Code code = Code::ok;
    uint64_t token = 0;  // not zero: the blocks that have not come may still be written, until it is cleared
    uint32_t first = 0;  // index of the block that statuses[0] is about
    std::vector<unsigned char> statuses;
    std::vector<Digest> digests;
    uint64_t bytes = 0;  // payload bytes moved by the whole job so far
    double waited_s = 0;  // from the start until the first byte of the answer; 0 if none came
    std::string detail;
    uint64_t ahead_bytes = 0;  // not zero: nothing is finished, but so many bytes of block `first` have landed
};

struct Limits {
    Clock::time_point deadline;
    Clock::duration first_byte;  // how long the other side may take to begin; a dead one never does
    Clock::duration stall;       // and how long it may pause afterwards
};

class Transfer {
  public:
    enum class Want { read, write, done };

    Transfer(uint64_t job, int fd, Limits limits)
        : job(job), fd(fd), limits(limits), started(Clock::now()), last_progress(started) {}
    virtual ~Transfer() = default;

    // The part of the work that is worth doing in the submitting thread, before the I/O thread has to be woken: a request
    // goes out at once, and a small answer needs no other thread at all. Never blocks.
    virtual Want begin() = 0;

    // Move bytes until the socket would block, the turn's budget is used, or the transfer ends. Never blocks.
    virtual Want step() = 0;

    // Blocks that are finished and not reported yet, moved out; the I/O thread sends them on.
    virtual bool take_partial(IoEvent*) { return false; }
    // How far the block that is on its way has come, when that is worth telling; its bytes are not proven.
    virtual bool take_ahead(IoEvent*) { return false; }
    virtual void fill_final(IoEvent*) {}
    // Both of these, where there is any, to `on_event`.
    void tell_news();

    Clock::time_point stalls_at() const {
        return begun ? last_progress + limits.stall : started + std::max(limits.first_byte, Clock::duration::zero());
    }
    Clock::time_point next_check() const { return std::min(limits.deadline, stalls_at()); }

    const uint64_t job;
    const int fd;
    const Limits limits;
    const Clock::time_point started;
    Clock::time_point last_progress;
    bool begun = false;  // whether the other side has begun to take part
    Code code = Code::ok;
    std::string detail;
    // Where events go instead of into the engine's queue: partial ones on the thread that steps the transfer (the submitting
    // one in begin(), then the I/O thread), and the final one, once, on whichever ended it.
    std::function<void(IoEvent)> on_event;

  protected:
    Want fail(Code why, std::string text = {}) {
        code = why;
        detail = std::move(text);
        return Want::done;
    }
    // After a system call returned -1: what that means for the transfer.
    Want on_errno(Want when_it_would_block);
};

struct Destination {
    unsigned char* address;
    uint32_t length;
};

// Sends a request and reads the one frame that answers it, as GET and PIN have in common.
class Asking : public Transfer {
  public:
    // `body_bytes`: that the answer's body will have, or has at least, so that it comes with the header in one system call.
    Asking(uint64_t job, int fd, Limits limits, std::string request, size_t body_bytes);
    Want begin() override { return send_request(); }
    Want step() override;

  protected:
    // Whether an answer may be of this type and have a body of so many bytes.
    virtual bool expects(unsigned char type, size_t body_bytes) const = 0;
    // The whole body is here. Want::done ends the transfer; else go_on() follows.
    virtual Want on_answer(std::span<const unsigned char> body) = 0;
    virtual Want go_on() = 0;
    double waited_s() const;  // until the first byte; 0 = none came

  private:
    enum class State { request, header, refusal, body, answered };
    Want send_request();
    Want read_frame();
    Want on_header();

    State state_ = State::request;
    std::string request_;
    size_t sent_ = 0;
    std::vector<unsigned char> frame_;  // being read; as long as it can be without taking what follows it
    size_t frame_got_ = 0;
    size_t frame_wanted_;  // the header, then all of it
    Clock::time_point first_byte_at_{};
};

// GET: the answer's records, then payloads straight into their destinations, hashing each piece while it is hot, and
// comparing each block's digest with the owner's before it counts.
class Receive final : public Asking {
  public:
    Receive(uint64_t job, int fd, Limits limits, std::string request, std::vector<Destination> blocks,
            uint64_t partial_bytes, uint64_t ahead_bytes = 0);
    // With `look`, which says whether the calling thread has nothing better to do: receives in it, without sleeping, for
    // as long as bytes keep coming, four milliseconds at most and never after the deadline. An owner on this host has often
    // answered before the request's system call is over.
    Want begin() override;
    std::function<bool()> look;
    bool take_partial(IoEvent* event) override;
    bool take_ahead(IoEvent* event) override;
    void fill_final(IoEvent* event) override;

  private:
    bool expects(unsigned char type, size_t body_bytes) const override;
    Want on_answer(std::span<const unsigned char> records) override;
    Want go_on() override;
    bool next_block();
    bool ahead() const;
    void report(IoEvent* event);

    std::vector<Destination> blocks_;
    const uint64_t partial_bytes_;
    const uint64_t ahead_bytes_;  // 0: never
    std::vector<unsigned char> statuses_;
    std::vector<Digest> expected_;
    std::vector<Digest> digests_;
    size_t block_ = 0;         // block being received
    size_t block_got_ = 0;     // bytes of it that are here
    size_t told_ahead_ = 0;    // bytes of it that have been told of
    size_t reported_ = 0;      // blocks already sent on
    uint64_t unreported_ = 0;  // payload bytes of finished blocks not sent on yet
    uint64_t bytes_ = 0;
    HashState hash_;
};

// PIN's answer: where the blocks lie in the owner's arena, and what they have to be.
struct PinAnswer {
    std::string endpoint;  // the NIXL agent whose memory that is
    double ttl_s = 0;      // of the lease, counted from when the owner answered
    std::vector<unsigned char> statuses;  // per asked block, as the following
    std::vector<uint64_t> offsets;
    std::vector<Digest> checksums;
};

// PIN: nothing comes after the answer. `out` is filled when it has ended well.
class Pin final : public Asking {
  public:
    Pin(uint64_t job, int fd, Limits limits, std::string request, std::vector<uint32_t> lengths,
        std::shared_ptr<PinAnswer> out);
    // The owner answers in less time than it takes to wake another thread for it: looks for the answer that long.
    Want begin() override;
    void fill_final(IoEvent* event) override { event->waited_s = waited_s(); }

  private:
    bool expects(unsigned char type, size_t body_bytes) const override;
    Want on_answer(std::span<const unsigned char> body) override;
    Want go_on() override { return Want::done; }

    const std::vector<uint32_t> lengths_;  // that the blocks must have
    const std::shared_ptr<PinAnswer> out_;
};

struct FileRun {
    uint64_t offset;
    uint64_t length;
};

// Send a ready-made header, then runs of the arena: by reference out of its memfd (sendfile), or by copying out of its
// mapping (`mapping` not null). By reference costs this CPU nothing, but between two processes of one host the reader
// then pays for every cache miss: there the copy is faster, because both ends work at the same time.
class Send final : public Transfer {
  public:
    Send(uint64_t job, int fd, Limits limits, std::string header, int file, const unsigned char* mapping,
         std::vector<FileRun> runs);
    Want begin() override;
    Want step() override;
    void fill_final(IoEvent* event) override { event->bytes = bytes_; }

  private:
    Want send_up_to(uint64_t bytes);

    std::string header_;
    size_t header_sent_ = 0;
    const int file_;
    const unsigned char* const mapping_;
    std::vector<FileRun> runs_;
    size_t run_ = 0;
    uint64_t run_sent_ = 0;
    uint64_t bytes_ = 0;
};

}  // namespace p2pkv
