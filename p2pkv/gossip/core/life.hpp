// One run of a node. The epoch grows at every start; the instance is drawn at random, and tells two processes apart that
// claim the same node and epoch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace p2pkv::gossip {

using NodeId = std::uint64_t;

struct Life {
  NodeId node = 0;
  std::uint32_t epoch = 0;
  std::uint64_t instance = 0;

  bool operator==(const Life&) const = default;
};

/// What tips call a node.
inline std::uint32_t tip_tag(NodeId node) { return static_cast<std::uint32_t>(node ^ (node >> 32U)); }

struct LifeHash {
  std::size_t operator()(const Life& life) const {
    return life.node * 0x9E3779B97F4A7C15ULL ^ life.instance ^ (static_cast<std::uint64_t>(life.epoch) << 32U);
  }
};

}  // namespace p2pkv::gossip
