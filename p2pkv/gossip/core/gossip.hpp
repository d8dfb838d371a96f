// Who is there, and who holds what: the rules, without a socket. docs/algorithm.md states them with their invariants.
//
// Sans-IO: events in (each with `now`, seconds of a monotonic clock), effects out (frames, letters, events to take). No
// clock, thread, socket or randomness but the seeded generator inside. One caller at a time. The agent's driver
// (p2pkv/gossip/driver.py) and the simulator run this very code.
//
//  1. Every node sends its own log to every member, in frames; a delta without keys is its heartbeat.
//  2. Only a node's own words about itself are believed. What others say of it (digests, tips) is a reason to ask it.
//  3. A life (node, epoch, instance) becomes a member when it has repeated this node's instance in a HELLO: so that it
//     is there now, and is no recording.
//  4. A member is ALIVE while it was heard within the silence limit and its entries are at a point that it has named.
//     Otherwise they are hidden. Not ALIVE for purge_s: forgotten. LEAVE drops the entries at once.
//  5. A newer epoch voids the older life. An older one is told STALE; so is a second process of the same epoch while the
//     first is alive. A node that is told STALE by those who have not heard the later life for a while takes a
//     later epoch.
//  6. Missing deltas are asked for (NACK): 2 ms after a gap, of the owner first, then of a random member; what a NACK does
//     not bring, or what is too much for it, is asked for as a snapshot (WANT), of anybody.
//  7. After a stall of its own, and when more than a quarter of the living fall silent at once, a node blames itself
//     first.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "contacts.hpp"
#include "counters.hpp"
#include "life.hpp"
#include "messages.hpp"
#include "replica.hpp"
#include "slot_table.hpp"
#include "../../index/core/entries.hpp"

namespace p2pkv::gossip {

inline constexpr double kNever = std::numeric_limits<double>::infinity();

struct Settings {
  double flush_s = 0.1;       // how long changes wait for each other
  double heartbeat_s = 0.2;   // of a log without changes
  double frames_per_s = 5'000;  // what a node sends at most in a large cell: both of the above stretch for it
  double silence_s = 3.0;     // at least; and at least 15 heartbeats
  double purge_s = 60.0;
  double digest_s = 2.0;
  double forget_s = 3'600.0;  // a lost member's address is tried for so long
  std::uint32_t members_max = 1'024;
  std::size_t entries_per_owner_max = 1U << 22U;
  std::uint8_t protocol_max = kProtocolMax;
};

enum class State : std::uint8_t { kUnreachable, kAlive, kLeft };

/// What every frame touches comes first, in two lines of the cache.
struct alignas(64) Member {
  Life life;
  State state = State::kUnreachable;
  bool hidden = true;
  bool knows_us = false;     // has said that it knows our present life
  std::uint8_t protocol = kProtocolMin;
  std::uint16_t load = 0;    // MiB that it was giving to others when it was last heard
  std::uint32_t card_number = 0;
  double last_heard = 0;     // a delta of its own
  double pardon_until = 0;   // rule 7
  std::uint64_t hint = 0;    // its log reaches this far, by hearsay
  double repair_at = kNever;
  Replica replica;
  ContactId contact = kNoContact;
  double since = 0;          // of the state
  double proven_at = -kNever;  // its entries here were last known to be its own set
  double card_asked = -kNever;
  double rtt_s = 0.001;      // of introductions, the shortest
  double refused_at = -kNever;  // a snapshot or its log was
  std::uint32_t nacks = 0;   // since the view last moved
  std::uint32_t wants = 0;   // likewise
  std::uint32_t want_id = 0;
  bool has_rtt = false;
  bool has_card = false;
  std::string card;

  Member(const Life& who, index::Entries& entries, std::uint32_t slot, std::size_t entries_max)
      : life(who), replica(entries, slot, entries_max) {}
};

/// What the driver or an operator should know of.
struct Event {
  enum class Kind : std::uint8_t {
    kMet, kRenewed, kShown, kHidden, kLeft, kPurged, kCard, kRenew, kInfo, kWarning, kError
  };
  Kind kind;
  NodeId node = 0;
  std::uint32_t slot = 0;
  std::uint64_t number = 0;  // kRenew: the epoch that this node must be later than
  std::string text;
};

struct FrameOut {
  Payload payload;
  std::shared_ptr<const std::vector<ContactId>> to;
};
struct LetterOut {
  Payload payload;
  ContactId to;
};

#define P2PKV_GOSSIP_COUNTS(X)                                                                             \
  X(frames_in) X(letters_in) X(malformed) X(unintroduced) X(stale) X(duplicate) X(twin) X(full)           \
  X(hellos_out) X(hellos_suppressed) X(deltas_out) X(heartbeats_out) X(nacks_out) X(nacks_in) X(relays_out)        \
  X(repeats_out) X(tips_new) X(wants_out) X(wants_in) X(snapshots_out) X(snapshots_in) X(snapshots_refused) \
  X(diverged) X(shown) X(hidden) X(silent) X(pardoned) X(stalls) X(purged) X(left) X(renewed) X(digests_out) X(digests_in)   \
  X(over_quota) X(protocol) X(contacts_full) X(renewals)

struct Counts {
#define X(name) std::uint64_t name = 0;
  P2PKV_GOSSIP_COUNTS(X)
#undef X
};

/// splitmix64 as a generator; deterministic, seeded, small.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits();
  double unit() { return static_cast<double>(bits() >> 11U) * 0x1.0p-53; }
  double within(double low, double high) { return low + (high - low) * unit(); }
  std::size_t below(std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>(bits() % n); }

 private:
  std::uint64_t state_;
};

class Gossip {
 public:
  /// `entries`: others' sets, in slots 1..members_max. `own`: this node's published set, in its slot 0; changed before
  /// publish() is called. Both outlive this.
  Gossip(const Settings& settings, const Life& life, std::string address, index::Entries& entries, index::Entries& own,
         std::uint64_t seed, double now);

  // --- events
  void set_card(double now, std::uint32_t number, std::string card);
  /// What this node is giving to others now: goes with what it says from now on. MiB; more than 65535 counts as that.
  void set_load(std::uint64_t mib) { load_ = static_cast<std::uint16_t>(std::min<std::uint64_t>(mib, 0xFFFF)); }
  /// What a member said that it gives to others, in MiB; 0 too if that is old, or it is not known.
  std::uint16_t load_of(NodeId node, double now) const;
  void on_seeds(double now, std::uint32_t source, const std::vector<std::string>& addresses);
  /// `host`: the numeric address that the frame came from, as host:port.
  void on_frame(double now, const Life& from, std::string_view source, const Payload& payload);
  void on_letter(double now, const Life& from, const Payload& payload);
  /// A connection with the node broke: its entries are hidden until it is heard again.
  void on_lost(double now, NodeId node);
  /// The next batch of the own log, which on_timer sends. At most kKeysPerDelta keys.
  void publish(std::uint64_t seq, std::uint64_t checksum, const std::array<std::vector<std::uint64_t>, kTiers>& keys);
  void on_timer(double now);
  void leave(double now);
  /// This node's next life, after an event kRenew: its log begins anew.
  void restart(double now, const Life& life);

  // --- when
  double next_timer() const { return std::min(tick_at_, std::min(flush_at_, repairs_.empty() ? kNever : repairs_.top().first)); }
  /// publish() what is due before the next on_timer.
  bool flush_due(double now) const { return now >= flush_at_; }

  // --- effects, since they were last taken
  std::vector<FrameOut> frames;
  std::vector<LetterOut> letters;
  std::vector<Event> events;

  // --- what is known
  const Life& life() const { return life_; }
  const std::string& address_of(ContactId id) const { return contacts_[id].address; }
  const Member* member(NodeId node) const;
  const Member* member_at(std::uint32_t slot) const { return slot < members_.size() ? members_[slot].get() : nullptr; }
  std::uint32_t slot_of(NodeId node) const { return slots_.find(node); }
  std::vector<std::uint32_t> slots() const;
  std::size_t alive() const { return alive_; }
  std::size_t contacts() const { return contacts_.size(); }
  double flush_s() const;
  double heartbeat_s() const;
  double silence_s() const;
  bool leaving() const { return leaving_; }
  Counts counts;

 private:
  enum class Standing { kNew, kSame, kLater, kEarlier, kSecond, kSelf, kTwin };

  // members.cpp
  Standing standing(const Life& life) const;
  void on_hello(double now, const Life& from, std::string_view source, std::string_view bytes);
  void answer_hello(double now, ContactId to, std::string_view address, const Life& from);
  void send_hello(double now, ContactId to, std::uint64_t echo, bool known, bool ask);
  void introduce(double now, const Life& from, Standing standing, std::string_view source, const Hello& hello);
  std::uint32_t take_slot();
  void void_member(double now, std::uint32_t slot, State state, const char* why);
  void remove_member(double now, std::uint32_t slot);
  void take_card(std::uint32_t slot, std::uint32_t number, std::string_view card);
  void tell_stale(double now, const Life& from, ContactId to);
  void on_stale(double now, std::string_view bytes);
  void on_leave(double now, const Life& from);
  void unknown(double now, const Life& from, std::string_view source);
  void show(double now, std::uint32_t slot);
  void hide(double now, std::uint32_t slot, const std::string& why);
  void probe(double now);
  void judge(double now);
  bool may_answer(double now);
  ContactId contact_of(double now, std::string_view source, std::string_view advertised);

  // repair.cpp
  void on_delta(double now, const Life& from, std::string_view source, const Payload& payload);
  void on_relay(double now, const Payload& payload);
  void on_nack(const Life& from, std::string_view bytes);
  void on_want(double now, const Life& from, std::string_view bytes);
  void on_snapshot(double now, const Payload& payload);
  void on_wanted(double now, std::string_view bytes);
  void on_digest(double now, const Life& from, std::string_view bytes);
  void settle(double now, std::uint32_t slot, const Outcome& outcome);
  void needs_repair(double now, std::uint32_t slot);
  void repair_from(std::uint32_t slot, double at);
  void repair(double now, std::uint32_t slot);
  void ask_snapshots(double now);
  void heard_of(double now, std::uint32_t slot, std::uint64_t seq);
  void send_digest(double now, std::uint32_t slot, bool ask);
  bool serve(const Wanted& wanted, ContactId to, std::size_t& bytes);
  std::uint32_t random_member(std::uint32_t but);

  // gossip.cpp
  std::uint32_t slot_for(const Life& life) const { return slots_.find(life); }  // of this very life
  void flush(double now);
  void broadcast(const Payload& payload, bool tips);
  void send(ContactId to, Payload payload);
  void letter(ContactId to, Payload payload) { letters.push_back({std::move(payload), to}); }
  void changed() { targets_.clear(); }
  void say(Event::Kind level, NodeId node, std::string text) { events.push_back({level, node, 0, 0, std::move(text)}); }
  void say_once(double now, Event::Kind level, NodeId node, const char* what, std::string text);

  Settings settings_;
  Life life_;
  std::string address_;
  index::Entries& entries_;
  index::Entries& own_;
  Random random_;
  Contacts contacts_;
  std::vector<std::unique_ptr<Member>> members_;  // by slot; 0 stays empty
  SlotTable slots_;
  std::size_t count_ = 0;
  std::deque<std::uint32_t> free_slots_;
  std::size_t alive_ = 0;

  std::uint32_t card_number_ = 0;
  std::string card_;
  std::uint64_t seq_ = 0;
  std::uint64_t checksum_ = 0;
  struct Published {
    std::uint64_t seq;
    Payload payload;
    bool sent;
  };
  std::deque<Published> log_tail_;

  struct Targets {
    std::uint8_t protocol;
    std::shared_ptr<const std::vector<ContactId>> to;
  };
  std::vector<Targets> targets_;
  std::uint16_t load_ = 0;
  std::vector<Tip> recent_;  // advances of others, a ring
  std::size_t recent_at_ = 0;

  using Repair = std::pair<double, std::uint32_t>;
  std::priority_queue<Repair, std::vector<Repair>, std::greater<>> repairs_;
  std::vector<std::uint32_t> wanting_;
  std::uint32_t next_want_ = 1;

  double started_;
  double flush_at_;
  double tick_at_;
  double beat_at_;
  double digest_at_;
  double judge_from_;
  double pardoned_at_ = -kNever;
  bool leaving_ = false;
  int leaves_left_ = 0;
  double hellos_left_ = 0;
  double answers_left_ = 0;
  double answers_at_ = -1e9;
  double serve_left_ = 0;
  double serve_at_ = -1e9;
  double renewed_at_ = -kNever;
  std::unordered_map<std::string, double> said_;
};

}  // namespace p2pkv::gossip
