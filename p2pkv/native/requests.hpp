// What a reader may say on a data connection, cut out of its bytes: GET, PIN and RELEASE, in the frames of
// p2pkv/wire/frame.py with the bodies of p2pkv/wire/peer.py. Sans-IO, and holds no more than what has arrived.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "placement.hpp"

namespace p2pkv {

constexpr unsigned char kTypePin = 8;  // p2pkv/wire/peer.py
constexpr unsigned char kTypePinned = 9;
constexpr unsigned char kTypeRelease = 10;
constexpr unsigned char kTypeGet = 12;
constexpr unsigned char kTypeGot = 13;
constexpr unsigned char kTypeError = 31;
constexpr size_t kGotRecordBytes = 32;     // per asked hash: docs/protocol.md
constexpr size_t kPinnedFixedBytes = 8;    // before the endpoint's name and the records
constexpr size_t kPinnedRecordBytes = 40;  // the same, and where the block lies in the arena
constexpr size_t kEndpointBytesMax = 256;  // a NIXL agent's name
constexpr size_t kKeysMax = 16384;         // p2pkv/wire/fields.py
constexpr size_t kRequestBytesMax = 2 << 20;  // the largest lawful GET has 1.1 MiB
constexpr size_t kReleaseBytesMax = 64;    // an array of one integer
constexpr size_t kRequestsQueuedMax = 16;  // a connection carries one at a time; what is sent ahead is bounded

// What GET and PIN ask for.
struct BlocksRequest {
    uint64_t space = 0;
    uint32_t ttl_ms = 0;
    uint32_t processor = kNoProcessor;   // of GET: where the thread runs that waits for the answer
    std::vector<std::string_view> keys;  // into the inbox
};

class Inbox {
  public:
    // Take bytes in. nullptr, or why the connection has to end; nothing may be fed or taken after that.
    const char* feed(std::string_view bytes);

    // The type of the next whole frame and its body, which stays valid until feed() or tidy(). False: there is none.
    bool next(unsigned char* type, std::string_view* body);

    // Forget what was taken, and give room back that a large request needed.
    void tidy();

    size_t queued() const { return queued_; }

  private:
    std::string bytes_;
    size_t taken_ = 0;    // up to here frames were given out
    size_t scanned_ = 0;  // up to here whole frames are known
    size_t queued_ = 0;   // whole frames between the two
};

// False: the body is not that message, the whole of it and nothing more.
bool parse_get(std::string_view body, BlocksRequest* out);
bool parse_pin(std::string_view body, BlocksRequest* out, bool* serve);
bool parse_release(std::string_view body);

std::string error_frame(std::string_view code, std::string_view message);

}  // namespace p2pkv
