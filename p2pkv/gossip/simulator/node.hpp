// One simulated process with its socket, its network card, and what it knows of its own log.
#pragma once

#include <unordered_set>

#include "simulation.hpp"

namespace p2pkv::sim {

struct Simulation::Node {
  std::uint32_t index;
  NodeId id;
  std::string address;
  bool up = false;
  bool leaving = false;
  std::uint32_t epoch = 0;
  std::uint32_t generation = 0;
  double disturbed_at = -1e9;  // it started, stood still, or went on
  double started_at = 0;
  double stalled_until = 0;
  double crashed_at = 0;
  double last_hidden = 0;
  double armed = gossip::kNever;
  double card_free = 0;  // its network card has sent everything by then
  std::vector<std::uint32_t> socket;  // flights that wait while it stands still
  std::unique_ptr<WholeSets> whole, own_whole;
  std::unique_ptr<SumSets> sums, own_sums;
  index::Entries* entries = nullptr;
  index::Entries* own = nullptr;
  std::unique_ptr<Gossip> core;
  gossip::FrameCounter counter;
  std::uint64_t last_counter = 0;
  bool counted = false;
  std::unordered_map<Life, gossip::ReplayWindow, gossip::LifeHash> windows;
  std::unordered_map<Life, std::unordered_set<std::uint64_t>, gossip::LifeHash> had;  // counters; for replays
  std::unordered_map<std::uint32_t, double> letters_until;
  History* history = nullptr;
  std::uint64_t seq = 0;
  std::vector<std::pair<std::uint64_t, std::uint32_t>> keys;  // published or about to be: key, tier
  struct Pending {
    std::uint64_t key;
    std::uint32_t tier;
    float born;
  };
  std::vector<Pending> pending;
  std::unordered_map<std::uint64_t, std::size_t> pending_at;
  double wrote_at = 0;
  double owed = 0;  // changes, a fraction of one
  std::vector<std::uint64_t> seen;  // by slot
};

}  // namespace p2pkv::sim
