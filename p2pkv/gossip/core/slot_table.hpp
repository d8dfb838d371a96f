// Which slot a node's life has, and how far its log is known: one look at one place in memory, which every frame of a
// thousand senders takes, and every tip in it.
//
// Open addressing with linear probing; removal moves what follows back (Knuth, TAOCP 3, 6.4, algorithm R).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "life.hpp"

namespace p2pkv::gossip {

class SlotTable {
 public:
  explicit SlotTable(std::size_t most) : places_(std::bit_ceil(2 * most + 2)) {}

  /// 0: no such node.
  std::uint32_t find(NodeId node) const { return places_[place(node)].slot; }
  /// 0: this very life is not there.
  std::uint32_t find(const Life& life) const {
    const Place& found = places_[place(life.node)];
    return found.life == life ? found.slot : 0;
  }
  /// By the short name that tips have for it; another one where two nodes share it.
  std::uint32_t find_tag(std::uint32_t tag, std::uint32_t& known) const {
    std::size_t at = home(tag);
    while (places_[at].slot != 0 && tip_tag(places_[at].life.node) != tag) at = (at + 1) & (places_.size() - 1);
    known = places_[at].known;
    return places_[at].slot;
  }
  /// At most `most` nodes; each once.
  void put(const Life& life, std::uint32_t slot) { places_[place(life.node)] = {life, slot, 0}; }
  /// The low half of the furthest sequence number that is known of its log.
  void know(NodeId node, std::uint32_t seq) { places_[place(node)].known = seq; }
  void erase(NodeId node) {
    const std::size_t mask = places_.size() - 1;
    std::size_t hole = place(node);
    if (places_[hole].slot == 0) return;
    for (std::size_t at = (hole + 1) & mask; places_[at].slot != 0; at = (at + 1) & mask) {
      if (((at - home(tip_tag(places_[at].life.node))) & mask) < ((at - hole) & mask)) continue;  // it is where it must be
      places_[hole] = places_[at];
      hole = at;
    }
    places_[hole] = {};
  }

 private:
  struct Place {
    Life life;
    std::uint32_t slot = 0;
    std::uint32_t known = 0;
  };
  std::size_t home(std::uint32_t tag) const { return (tag * 0x9E3779B97F4A7C15ULL) >> 32U & (places_.size() - 1); }
  std::size_t place(NodeId node) const {
    std::size_t at = home(tip_tag(node));
    while (places_[at].slot != 0 && places_[at].life.node != node) at = (at + 1) & (places_.size() - 1);
    return at;
  }

  std::vector<Place> places_;
};

}  // namespace p2pkv::gossip
