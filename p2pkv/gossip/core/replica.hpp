// One owner's log as another node keeps it, for one life of the owner.
//
//  1. The owner's set is empty at sequence number 0; every delta with keys raises the number by one and says the checksum
//     of the set after it. A delta without keys repeats number and checksum.
//  2. The view moves only to points that the owner itself has named: a delta from somebody else (a RELAY) waits until
//     those behind it reach one that came from the owner, and the checksum there must be the owner's.
//  3. A wrong checksum: the view is void (DIVERGED) until a snapshot replaces it.
//  4. A snapshot may come from anybody. It counts only when all parts are there, they have the checksum that it says, and
//     the owner has said nothing else of that point; and it is not shown before the owner has said that checksum, or a
//     later one that the set has after the deltas that follow.
//
// Pure: no clock, no messages sent. Writes one slot of the entries. Everything held is bounded.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "../../index/core/entries.hpp"
#include "messages.hpp"

namespace p2pkv::gossip {

/// What a message did to a replica.
struct Outcome {
  bool advanced = false;  // the view has moved
  bool proven = false;    // it is at a point that the owner has just named, or has been moved to one
  bool diverged = false;  // the owner has another set
  bool refused = false;   // a snapshot whose checksum lies, or more than an owner may have
  bool full = false;      // the entries have no room
};

/// Missing sequence numbers; none when `to` < `from`.
struct Hole {
  std::uint64_t from = 1, to = 0;
  std::uint64_t size() const { return to < from ? 0 : to - from + 1; }
};

class Replica {
 public:
  static constexpr std::size_t kHeldMax = 128;
  static constexpr std::size_t kTail = 4;

  Replica(index::Entries& entries, std::uint32_t slot, std::size_t entries_max)
      : entries_(entries), slot_(slot), entries_max_(entries_max) {}

  /// Where the view stands.
  std::uint64_t seq() const { return seq_; }
  /// The furthest point that the owner has named.
  std::uint64_t said() const { return said_seq_; }
  /// The view is the owner's set at seq(), by the owner's own word.
  bool proven() const { return proven_ && !diverged_; }
  bool diverged() const { return diverged_; }
  /// At the furthest point that the owner has named.
  bool current() const { return proven() && seq_ == said_seq_; }
  /// The last of the deltas that only others have repeated: the view waits for the owner's word. 0: it does not.
  std::uint64_t unconfirmed() const { return held_.empty() || held_.rbegin()->first <= said_seq_ ? 0 : held_.rbegin()->first; }
  /// Deltas are missing, by the owner's own word.
  bool behind() const { return said_seq_ > seq_; }
  /// The first deltas that are missing, when the log is known to reach `known`.
  Hole hole(std::uint64_t known) const;

  /// `direct`: from the owner itself. `holder` keeps the bytes that the delta's views point into.
  Outcome hear(const Delta& delta, const Payload& holder, bool direct);
  Outcome install(const Snapshot& part, const Payload& holder);
  /// A snapshot is on its way.
  bool assembling() const { return assembly_ != nullptr && assembly_->missing != 0; }

  /// The body of a delta that was applied a moment ago; empty when it is not kept.
  std::string_view tail(std::uint64_t seq) const;

 private:
  struct Held {
    Payload holder;
    std::string_view body;
    bool direct;
  };
  struct Kept {
    std::uint64_t seq;
    Payload holder;
    std::string_view body;
  };
  struct Assembly {
    std::uint64_t seq, checksum;
    std::vector<bool> there;
    std::size_t missing;
    std::vector<index::TierKeys> groups;
    std::vector<Payload> holders;
    std::size_t keys = 0;
    std::uint64_t sum = 0;
  };

  bool apply(const Delta& delta, const Payload& holder, Outcome& out);
  void compare(std::uint64_t checksum, Outcome& out);
  void advance(Outcome& out);
  void finish(Outcome& out);
  void drop_held();

  index::Entries& entries_;
  std::uint32_t slot_;
  bool proven_ = true;  // the empty set at 0
  bool diverged_ = false;
  std::uint64_t seq_ = 0;
  std::uint64_t said_seq_ = 0;
  std::uint64_t said_checksum_ = 0;
  std::size_t entries_max_;
  std::map<std::uint64_t, Held> held_;
  std::vector<Kept> tail_;
  std::unique_ptr<Assembly> assembly_;
};

}  // namespace p2pkv::gossip
