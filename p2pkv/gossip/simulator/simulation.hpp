// A cell of protocol cores under virtual time, driven by one seed: the same seed gives the same bytes.
//
// What runs is the code that ships (../core). Simulated are clocks, the network and the processes: frames are lost,
// doubled, overtaken and changed (a changed one is dropped, as its seal breaks), letters take as long as their bytes at
// the network card's rate; processes stall, crash, leave and come back, also with an epoch that is too old.
//
// After every event the simulator compares what the node it happened to shows with what the owners really had.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <queue>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "../core/gossip.hpp"
#include "sets.hpp"

namespace p2pkv::sim {

using gossip::Gossip;
using gossip::Life;
using gossip::NodeId;
using gossip::Payload;

struct Options {
  std::uint32_t nodes = 8;
  std::uint64_t seed = 1;
  double loss = 0;            // of frames
  double doubled = 0;
  double corrupt = 0;
  double latency_s = 0.0005;  // one way, typical
  double late = 0.01;         // frames that take ten times as long
  double bits_per_s = 10e9;   // of a network card, for letters
  double changes_per_s = 0;   // ownership changes of each node
  std::uint32_t seeds = 3;    // the first nodes, whose addresses everybody has
  bool whole_sets = true;
  bool windows = true;        // every node keeps a replay window for every life
  double lies = 0;            // of repeated deltas and snapshots: their keys are changed
  std::uint32_t recorded = 0;  // frames that somebody keeps, to send them again
  std::uint32_t socket_frames = 4'096;  // that wait for a process that stands still
  gossip::Settings settings;
};

/// What one life of a node has published, by sequence number.
struct History {
  std::vector<std::uint64_t> checksums{0};
  std::vector<std::size_t> ends{0};  // of `changes`, after each
  std::vector<std::pair<std::uint64_t, std::uint32_t>> changes;  // key, tier
  struct Batch {
    std::vector<float> born;
    std::uint32_t left = 0;
    double published = 0;
  };
  std::vector<Batch> batches{1};
  double ended_at = gossip::kNever;
};

struct Results {
  std::uint64_t events = 0, frames = 0, frame_bytes = 0, letters = 0, letter_bytes = 0, useful_bytes = 0, lost = 0;
  std::uint64_t checks = 0, false_marks = 0, marks = 0, refused_replays = 0, overflowed = 0;
  double pair_seconds = 0;
  std::vector<float> visible_ms;      // of each change, at all nodes
  std::vector<std::pair<double, double>> unseen;  // per crash: until the last healthy node marked it; -1: not all have
  std::vector<std::string> violations;
};

class Simulation {
 public:
  explicit Simulation(const Options& options);
  ~Simulation();
  Simulation(const Simulation&) = delete;
  Simulation& operator=(const Simulation&) = delete;

  double now() const { return now_; }
  void run(double seconds);
  bool failed() const { return !results.violations.empty(); }

  // faults and work
  void start(std::uint32_t i);            // a new life, with the next epoch
  void restore(std::uint32_t i);          // a new life, with an epoch before the last one's: a restored state directory
  void crash(std::uint32_t i);
  void leave(std::uint32_t i);
  void stall(std::uint32_t i, double seconds);
  void cut(std::uint32_t from, std::uint32_t to, bool is_cut);  // one way
  void heal();
  void write(std::uint32_t i, std::uint32_t changes, bool removals);
  void set_changes_per_s(double rate) { options_.changes_per_s = rate; }
  void chaos(std::uint32_t steps);
  void quiet();                           // nothing goes wrong any more, and everybody is there
  void measure(bool on) { measuring_ = on; }
  void replay_something();

  bool up(std::uint32_t i) const;
  /// Seconds from a node's crash until the last of the others hid it; -1 while somebody shows it.
  double known_after(std::uint32_t i) const;
  /// How many of the others show it.
  std::uint32_t shown_by(std::uint32_t i) const;
  /// Every node shows every other as it is. `why`: the first that does not.
  bool converged(std::string* why = nullptr) const;
  std::uint64_t digest() const { return trace_; }  // of all that happened: equal seeds, equal bytes
  gossip::Counts counts() const;
  void dump() const;  // to stdout, for people
  std::vector<std::size_t> alive_by_node() const;
  const Options& options() const { return options_; }
  Results results;

 private:
  struct Node;
  struct Flight {
    Payload payload;
    Life from;
    std::uint32_t source;
    std::uint64_t counter;
    std::uint32_t uses;
    bool letter;
  };
  enum class Kind : std::uint8_t { kFrame, kLetter, kTimer, kStart, kResume };
  struct Event {
    double at;
    std::uint32_t order;
    std::uint32_t node;
    std::uint32_t what;  // flight, or generation of the node
    Kind kind;
    bool operator>(const Event& other) const { return at != other.at ? at > other.at : order > other.order; }
  };

  void push(double at, std::uint32_t node, Kind kind, std::uint32_t what);
  void handle(const Event& event);
  void arrive(std::uint32_t node, std::uint32_t flight);
  void deliver(Node& node, const Flight& flight);
  void timer(Node& node);
  void drain(Node& node);
  void arm(Node& node);
  void begin(std::uint32_t i, std::uint32_t epoch);
  void send_frame(Node& node, const gossip::FrameOut& out);
  void send_letter(Node& node, const gossip::LetterOut& out);
  void release(std::uint32_t flight);
  std::uint32_t fly(Payload payload, Node& node, bool letter);
  std::uint32_t node_at(const std::string& address) const;
  bool is_cut(std::uint32_t from, std::uint32_t to) const;
  Payload lie(const Payload& payload);
  void check(Node& node, std::uint32_t slot);
  void check_dead(Node& node);
  void look(Node& node, std::uint32_t slot);
  void note(Node& node, const gossip::Event& event);
  void violation(const std::string& text);
  void account();
  double latency();
  bool healthy_pair(const Node& reader, const Node& owner) const;
  Node* owner_of(NodeId id) const;

  Options options_;
  gossip::Random random_;
  double now_ = 1'000.0;
  std::uint32_t order_ = 0;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> queue_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::unordered_map<std::string, std::uint32_t> by_address_;
  std::unordered_map<NodeId, std::uint32_t> by_id_;
  std::vector<Flight> flights_;
  std::vector<std::uint32_t> free_flights_;
  std::unordered_map<Life, std::unique_ptr<History>, gossip::LifeHash> histories_;
  std::vector<bool> cuts_;
  bool any_cut_ = false;
  std::vector<double> cut_until_;
  bool measuring_ = false;
  bool calm_ = false;
  std::uint64_t trace_ = 0;
  std::uint32_t healthy_ = 0;
  double accounted_at_ = 0;
  std::vector<std::uint32_t> recorded_;  // flights kept for a replay
};

/// A cell of two to seven nodes with everything that can go wrong, as the seed has it.
Options small_chaos(std::uint64_t seed);
/// Chaos, then silence; what rule was broken, or nothing.
std::string run_chaos(Simulation& cell);

}  // namespace p2pkv::sim
