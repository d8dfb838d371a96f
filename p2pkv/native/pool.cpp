#include "pool.hpp"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <string>

#include "frame.hpp"
#include "msgpack.hpp"
#include "requests.hpp"

namespace p2pkv {
namespace {
// As in p2pkv/transport/patience.py.
constexpr double kFloorS = 0.08;
constexpr double kFactor = 4.0;
constexpr double kForget = 0.95;
// Of this module alone.
constexpr double kNearS = 0.0004;
constexpr double kSlower = 1.02;  // per answer: that a peer is near no longer is seen after a hundred

// RELEASE of what the connection's last answer held.
std::string release_frame() {
    std::string body;
    msgpack::Writer writer(&body);
    writer.array(1);
    writer.uint(0);
    return frame::make(kTypeRelease, 0, body);
}
}  // namespace

void Pool::give(uint64_t node, uint32_t slot, int fd, bool owes_release) {
    std::lock_guard lock(mutex_);
    Peer& peer = peers_[node];
    if (peer.slot != slot) node_of_slot_.erase(peer.slot);
    peer.slot = slot;
    if (slot != 0) node_of_slot_[slot] = node;
    if (peer.idle.size() >= per_node_) {
        close(peer.idle.front().fd);
        peer.idle.pop_front();
    }
    peer.idle.push_back({fd, owes_release});
}

void Pool::settle(uint64_t node, int fd) {
    static const std::string release = release_frame();
    std::lock_guard lock(mutex_);
    const auto it = peers_.find(node);
    if (it == peers_.end()) return;
    auto& idle = it->second.idle;
    const auto mine = std::find_if(idle.begin(), idle.end(), [fd](const Idle& each) { return each.fd == fd; });
    if (mine == idle.end() || !mine->owes_release) return;
    mine->owes_release = false;
    const ssize_t sent = send(fd, release.data(), release.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent == static_cast<ssize_t>(release.size())) return;
    close(fd);  // the owner sees that
    idle.erase(mine);
}

int Pool::pop(Peer& peer) {
    if (peer.idle.empty()) return -1;
    const int fd = peer.idle.back().fd;
    peer.idle.pop_back();
    return fd;
}

int Pool::take(uint64_t node) {
    std::lock_guard lock(mutex_);
    const auto it = peers_.find(node);
    return it == peers_.end() ? -1 : pop(it->second);
}

double Pool::first_byte_s(const Peer& peer) const {
    if (peer.slowest_s <= 0) return ceiling_s_;
    return std::min(ceiling_s_, std::max(kFloorS, kFactor * peer.slowest_s));
}

bool Pool::near(const Peer& peer) { return peer.quickest_s > 0 && peer.quickest_s < kNearS; }

bool Pool::is_near(uint64_t node) {
    std::lock_guard lock(mutex_);
    const auto it = peers_.find(node);
    return it != peers_.end() && near(it->second);
}

Pool::Taken Pool::take_slot(uint32_t slot) {
    std::lock_guard lock(mutex_);
    const auto node = node_of_slot_.find(slot);
    if (node == node_of_slot_.end()) return {};
    Peer& peer = peers_[node->second];
    return {pop(peer), node->second, first_byte_s(peer), near(peer)};
}

uint64_t Pool::node_of(uint32_t slot) {
    std::lock_guard lock(mutex_);
    const auto node = node_of_slot_.find(slot);
    return node == node_of_slot_.end() ? 0 : node->second;
}

void Pool::drop(uint64_t node) {
    std::lock_guard lock(mutex_);
    const auto it = peers_.find(node);
    if (it == peers_.end()) return;
    for (const Idle& each : it->second.idle) close(each.fd);
    node_of_slot_.erase(it->second.slot);
    peers_.erase(it);
}

void Pool::clear() {
    std::lock_guard lock(mutex_);
    for (auto& [node, peer] : peers_)
        for (const Idle& each : peer.idle) close(each.fd);
    peers_.clear();
    node_of_slot_.clear();
}

size_t Pool::idle() {
    std::lock_guard lock(mutex_);
    size_t count = 0;
    for (const auto& [node, peer] : peers_) count += peer.idle.size();
    return count;
}

size_t Pool::idle_at(uint64_t node) {
    std::lock_guard lock(mutex_);
    const auto it = peers_.find(node);
    return it == peers_.end() ? 0 : it->second.idle.size();
}

void Pool::expect(uint64_t node, double first_byte_s, double byte_s) {
    std::lock_guard lock(mutex_);
    const auto it = peers_.find(node);
    if (it == peers_.end()) return;
    it->second.first_byte_s = first_byte_s;
    it->second.byte_s = byte_s;
}

double Pool::cost(uint32_t slot, uint64_t bytes) {
    std::lock_guard lock(mutex_);
    const auto node = node_of_slot_.find(slot);
    if (node == node_of_slot_.end()) return std::numeric_limits<double>::infinity();
    const Peer& peer = peers_[node->second];
    if (peer.idle.empty()) return std::numeric_limits<double>::infinity();
    return peer.first_byte_s + static_cast<double>(bytes) * peer.byte_s;
}

void Pool::shun(uint32_t slot, bool shunned) {
    std::lock_guard lock(mutex_);
    if (shunned) {
        shunned_.insert(slot);
    } else {
        shunned_.erase(slot);
    }
}

bool Pool::shunned(uint32_t slot) {
    std::lock_guard lock(mutex_);
    return shunned_.contains(slot);
}

void Pool::learn(uint64_t node, double waited_s) {
    if (waited_s <= 0) return;
    std::lock_guard lock(mutex_);
    const auto it = peers_.find(node);
    if (it == peers_.end()) return;
    Peer& peer = it->second;
    peer.slowest_s = std::max(waited_s, peer.slowest_s * kForget);
    peer.quickest_s = peer.quickest_s <= 0 ? waited_s : std::min(waited_s, peer.quickest_s * kSlower);
}

}  // namespace p2pkv
