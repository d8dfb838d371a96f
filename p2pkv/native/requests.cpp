#include "requests.hpp"

#include <cstring>

#include "msgpack.hpp"

namespace p2pkv {
namespace {

constexpr size_t kHeaderBytes = 12;
constexpr unsigned char kFrameVersion = 1;
constexpr unsigned char kTypeError = 31;
constexpr size_t kKeyBytesMin = 8;
constexpr size_t kKeyBytesMax = 64;
constexpr size_t kRoomKept = 64 << 10;  // a connection that idles keeps at most so much

const char* problem(uint32_t length, unsigned char version, unsigned char type) {
    if (version != kFrameVersion) return "frame has a version this build does not speak";
    if (type != kTypeGet && type != kTypeRelease) return "only GET and RELEASE belong on a data connection";
    if (length > (type == kTypeGet ? kRequestBytesMax : kReleaseBytesMax)) return "frame is too large";
    return nullptr;
}

}  // namespace

const char* Inbox::feed(std::string_view bytes) {
    tidy();
    bytes_.append(bytes);
    while (bytes_.size() - scanned_ >= kHeaderBytes) {
        const char* header = bytes_.data() + scanned_;
        uint32_t length;
        std::memcpy(&length, header, sizeof length);
        const char* wrong = problem(length, static_cast<unsigned char>(header[4]), static_cast<unsigned char>(header[5]));
        if (wrong != nullptr) return wrong;
        if (bytes_.size() - scanned_ - kHeaderBytes < length) break;
        scanned_ += kHeaderBytes + length;
        if (++queued_ > kRequestsQueuedMax) return "a data connection carries one request at a time";
    }
    return nullptr;
}

bool Inbox::next(unsigned char* type, std::string_view* body) {
    if (queued_ == 0) return false;
    const char* header = bytes_.data() + taken_;
    uint32_t length;
    std::memcpy(&length, header, sizeof length);
    *type = static_cast<unsigned char>(header[5]);
    *body = std::string_view(header + kHeaderBytes, length);
    taken_ += kHeaderBytes + length;
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

bool parse_get(std::string_view body, GetRequest* out) {
    msgpack::Reader reader(body);
    uint64_t fields, count, ttl_ms;
    if (!reader.array(&fields) || fields < 3 || !reader.uint(&out->space) || !reader.array(&count)) return false;
    if (count > kKeysMax) return false;
    out->keys.clear();
    for (uint64_t i = 0; i < count; ++i) {
        std::string_view key;
        if (!reader.bin(&key) || key.size() < kKeyBytesMin || key.size() > kKeyBytesMax) return false;
        out->keys.push_back(key);
    }
    if (!reader.uint(&ttl_ms) || ttl_ms > UINT32_MAX || !reader.skip(fields - 3) || !reader.at_end()) return false;
    out->ttl_ms = static_cast<uint32_t>(ttl_ms);
    return true;
}

bool parse_release(std::string_view body) {
    msgpack::Reader reader(body);
    uint64_t fields, lease;
    return reader.array(&fields) && fields >= 1 && reader.uint(&lease) && reader.skip(fields - 1) && reader.at_end();
}

std::string frame_header(unsigned char type, size_t body_bytes) {
    std::string out(kHeaderBytes, '\0');
    const auto length = static_cast<uint32_t>(body_bytes);
    std::memcpy(out.data(), &length, sizeof length);
    out[4] = static_cast<char>(kFrameVersion);
    out[5] = static_cast<char>(type);
    return out;
}

std::string error_frame(std::string_view code, std::string_view message) {
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(3);
    writer.str(code);
    writer.str(message);
    writer.array(0);
    return frame_header(kTypeError, body.size()) + body;
}

}  // namespace p2pkv
