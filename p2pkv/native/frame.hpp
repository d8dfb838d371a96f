// The frame of every stream socket: 12 bytes of header, then a msgpack (or, for answers with blocks, a binary) body.
// p2pkv/wire/frame.py says what each byte means.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace p2pkv::frame {

constexpr size_t kHeaderBytes = 12;
constexpr unsigned char kVersion = 1;

struct Header {
    uint32_t length;  // of the body, in bytes
    unsigned char version;
    unsigned char type;
    uint32_t request_id;
};

// `at`: kHeaderBytes bytes.
inline Header parse(const void* at) {
    const auto* bytes = static_cast<const unsigned char*>(at);
    Header header;
    std::memcpy(&header.length, bytes, sizeof header.length);
    header.version = bytes[4];
    header.type = bytes[5];
    std::memcpy(&header.request_id, bytes + 8, sizeof header.request_id);
    return header;
}

// A header alone: for who appends `body_bytes` bytes.
inline std::string begin(unsigned char type, size_t body_bytes, uint32_t request_id = 0) {
    std::string out(kHeaderBytes, '\0');
    const auto length = static_cast<uint32_t>(body_bytes);
    std::memcpy(out.data(), &length, sizeof length);
    out[4] = static_cast<char>(kVersion);
    out[5] = static_cast<char>(type);
    std::memcpy(out.data() + 8, &request_id, sizeof request_id);
    return out;
}

inline std::string make(unsigned char type, uint32_t request_id, std::string_view body) {
    return begin(type, body.size(), request_id).append(body);
}

}  // namespace p2pkv::frame
