// What the lane remembers of its engines' connections, of the GETs it works on, and of the pulls for them.
#pragma once
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "lane.hpp"

namespace p2pkv {

// p2pkv/wire/engine.py
constexpr unsigned char kEngineGet = 73, kEngineGot = 74, kEngineRelease = 75, kEngineAhead = 79;
constexpr unsigned char kLocal = 1, kPeer = 2;
// p2pkv/types.py
constexpr unsigned char kMiss = 1, kTimeout = 3, kUnreachable = 4, kBusy = 5, kLost = 8;

constexpr int kReleaseMs = 1;  // so long an owner may hold blocks that have come already

inline double now_s() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

constexpr uint32_t kHoldersMax = 16;  // that are asked of the index

// What the index knows a block by.
inline uint64_t index_key(std::string_view key, uint64_t salt) {
    uint64_t hash;
    std::memcpy(&hash, key.data(), sizeof hash);
    return hash ^ salt;
}

// What a block that is being pulled is called.
inline std::string flight_of(uint64_t space, std::string_view key) {
    std::string name(reinterpret_cast<const char*>(&space), sizeof space);
    return name += key;
}

struct Lane::Connection {
    Connection(uint64_t id, int fd, uint64_t holder) : id(id), fd(fd), holder(holder) {}
    ~Connection() { ::close(fd); }  // not before: another thread could be about to use its number

    const uint64_t id;
    const int fd;
    const uint64_t holder;
    std::atomic<uint32_t> in_flight{0};
    std::atomic<uint32_t> waiting{0};  // GETs handed over that Python has not looked at yet
    std::string in;  // the lane's thread only

    std::mutex mutex;  // guards what follows, and writing to fd
    std::unordered_map<uint64_t, uint64_t> salts;  // per namespace that may be asked for
    std::string out;
    bool closed = false;
};

struct Lane::Request {
    ConnectionRef connection;
    uint32_t id = 0;
    double asked_at = 0, deadline = 0;
    uint64_t space = 0, salt = 0;
    uint32_t processor = kNoProcessor;   // where the engine's thread waits
    bool unleased = false;               // it reads what has come by the directory: nothing need be held
    std::string body;                    // what the keys are views of
    std::vector<std::string_view> keys;

    std::mutex mutex;  // guards what follows: pulls may end on two threads at once
    std::vector<unsigned char> settled;  // per key: 1 once the engine has been answered
    std::vector<unsigned char> failed;   // per key: how the lane's attempt at it failed
    size_t left = 0;                     // keys that are not settled
    size_t pulls = 0;                    // under way
    uint64_t failed_node = 0;            // whom Python should not ask first
    Code failed_code = Code::ok;
};

struct Lane::Pull {
    std::shared_ptr<Request> request;
    uint64_t job = 0;
    uint64_t node = 0;
    uint32_t slot = 0;
    int fd = -1;
    double first_byte_s = 0;
    double asked_at = 0;
    double enough_s = std::numeric_limits<double>::infinity();  // after so long somebody else should be asked
    bool look = false;  // the answer is worth waiting for without sleeping
    bool one_sided = false;  // PIN, then a read by the NIXL process; else GET
    std::vector<uint32_t> indices;  // into the request's keys
    std::vector<store::BlockRef> blocks;
    size_t done = 0;      // of them, committed or aborted
    uint64_t came = 0;    // committed
    uint64_t rejected = 0, missed = 0;  // of the others
    bool told_ahead = false;
};

}  // namespace p2pkv
