#include "requests.hpp"

#include <algorithm>

#include "frame.hpp"
#include "msgpack.hpp"

namespace p2pkv {
namespace {

using frame::kHeaderBytes;
constexpr size_t kKeyBytesMin = 8;
constexpr size_t kKeyBytesMax = 64;
constexpr size_t kRoomKept = 64 << 10;  // a connection that idles keeps at most so much

const char* problem(const frame::Header& header) {
    if (header.version != frame::kVersion) return "frame has a version this build does not speak";
    const bool names_blocks = header.type == kTypeGet || header.type == kTypePin;
    if (!names_blocks && header.type != kTypeRelease) return "only GET, PIN and RELEASE belong on a data connection";
    if (header.length > (names_blocks ? kRequestBytesMax : kReleaseBytesMax)) return "frame is too large";
    return nullptr;
}

// What GET and PIN begin with: namespace, hashes, ttl_ms. `fields`: how many the message has.
bool parse_blocks(msgpack::Reader& reader, uint64_t fields_min, uint64_t* fields, BlocksRequest* out) {
    uint64_t count, ttl_ms;
    if (!reader.array(fields) || *fields < fields_min || !reader.uint(&out->space) || !reader.array(&count)) return false;
    if (count > kKeysMax) return false;
    out->keys.clear();
    for (uint64_t i = 0; i < count; ++i) {
        std::string_view key;
        if (!reader.bin(&key) || key.size() < kKeyBytesMin || key.size() > kKeyBytesMax) return false;
        out->keys.push_back(key);
    }
    if (!reader.uint(&ttl_ms) || ttl_ms > UINT32_MAX) return false;
    out->ttl_ms = static_cast<uint32_t>(ttl_ms);
    return true;
}

}  // namespace

const char* Inbox::feed(std::string_view bytes) {
    tidy();
    bytes_.append(bytes);
    while (bytes_.size() - scanned_ >= kHeaderBytes) {
        const frame::Header header = frame::parse(bytes_.data() + scanned_);
        if (const char* wrong = problem(header)) return wrong;
        if (bytes_.size() - scanned_ - kHeaderBytes < header.length) break;
        scanned_ += kHeaderBytes + header.length;
        if (++queued_ > kRequestsQueuedMax) return "a data connection carries one request at a time";
    }
    return nullptr;
}

bool Inbox::next(unsigned char* type, std::string_view* body) {
    if (queued_ == 0) return false;
    const char* at = bytes_.data() + taken_;
    const frame::Header header = frame::parse(at);
    *type = header.type;
    *body = std::string_view(at + kHeaderBytes, header.length);
    taken_ += kHeaderBytes + header.length;
    --queued_;
    return true;
}

void Inbox::tidy() {
    if (taken_ == 0) return;
    bytes_.erase(0, taken_);
    scanned_ -= taken_;
    taken_ = 0;
    if (bytes_.capacity() > kRoomKept && bytes_.size() < kRoomKept) bytes_.shrink_to_fit();
}

bool parse_get(std::string_view body, BlocksRequest* out) {
    msgpack::Reader reader(body);
    uint64_t fields;
    if (!parse_blocks(reader, 3, &fields, out)) return false;
    uint64_t processor = kNoProcessor;
    if (fields > 3 && (!reader.uint(&processor) || processor > kNoProcessor)) return false;
    out->processor = static_cast<uint32_t>(processor);
    return reader.skip(fields - std::min<uint64_t>(fields, 4)) && reader.at_end();
}

bool parse_pin(std::string_view body, BlocksRequest* out, bool* serve) {
    msgpack::Reader reader(body);
    uint64_t fields;
    return parse_blocks(reader, 4, &fields, out) && reader.boolean(serve) && reader.skip(fields - 4) && reader.at_end();
}

bool parse_release(std::string_view body) {
    msgpack::Reader reader(body);
    uint64_t fields, lease;
    return reader.array(&fields) && fields >= 1 && reader.uint(&lease) && reader.skip(fields - 1) && reader.at_end();
}

std::string error_frame(std::string_view code, std::string_view message) {
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(3);
    writer.str(code);
    writer.str(message);
    writer.array(0);
    return frame::make(kTypeError, 0, body);
}

}  // namespace p2pkv
