// Who holds what: the streams of others, and what is done about their holes.
#include <algorithm>
#include <array>
#include <cmath>

#include "gossip.hpp"

namespace p2pkv::gossip {

namespace {

constexpr double kReorderS = 0.002;   // a gap may close by itself
constexpr double kNackAgainS = 0.008;  // at least, and two and a half round trips; grows by a fifth
constexpr double kNackAgainMostS = 0.040;
constexpr std::uint32_t kHearsayNacksMost = 4;
constexpr double kNackGrowth = 1.2;
constexpr std::uint32_t kNacksMost = 8;
constexpr std::uint64_t kNackSpan = 64;
constexpr std::uint64_t kRepeatsMost = 32;
constexpr double kWantAgainS = 1.0;
constexpr std::size_t kBulkLeast = 8;
constexpr std::size_t kBulkSources = 4;
constexpr std::size_t kServeBytes = 4U << 20U;       // per WANT, and one owner's set more
constexpr double kServeBytesPerS = 256.0 * (1U << 20U);
constexpr double kCardAgainS = 1.0;
constexpr double kRefusedWaitS = 5.0;
constexpr std::size_t kRecentMax = 256;
constexpr std::uint32_t kHeardLatelyMs = 2'000;
constexpr double kHelloAgainS = 0.2;

}  // namespace

void Gossip::on_delta(double now, const Life& from, std::string_view source, const Payload& payload) {
  const std::uint32_t slot = slot_for(from);
  if (slot == 0) return unknown(now, from, source);
  Member& member = *members_[slot];
  if (member.state == State::kLeft) return;
  Delta delta;
  if (!decode(*payload, delta)) {
    ++counts.malformed;
    return;
  }
  member.last_heard = now;
  member.pardon_until = 0;
  if (delta.load) member.load = *delta.load;
  if (delta.card != member.card_number && now - member.card_asked > kCardAgainS) {
    member.card_asked = now;
    letter(member.contact, encode_card_want());
  }
  const std::uint64_t before = std::max(member.replica.seq(), member.replica.said());
  const Outcome outcome = member.replica.hear(delta, payload, true);
  settle(now, slot, outcome);
  if (delta.seq > before) slots_.know(from.node, static_cast<std::uint32_t>(delta.seq));
  if (delta.seq > before && delta.key_count() != 0) {
    const Tip tip{tip_tag(from.node), static_cast<std::uint32_t>(delta.seq)};
    if (recent_.size() < kRecentMax)
      recent_.push_back(tip);
    else
      recent_[recent_at_++ % kRecentMax] = tip;
  }
  for (std::size_t i = 0; i < delta.tip_count; ++i) {
    std::uint32_t known;
    const std::uint32_t whose = slots_.find_tag(delta.tips[i].owner, known);
    if (whose == 0 || static_cast<std::int32_t>(delta.tips[i].seq - known) <= 0) continue;
    const Replica& replica = members_[whose]->replica;
    const std::uint64_t reached = std::max(replica.seq(), replica.said());
    const auto ahead = static_cast<std::int32_t>(delta.tips[i].seq - static_cast<std::uint32_t>(reached));
    if (ahead > 0) heard_of(now, whose, reached + static_cast<std::uint32_t>(ahead));
  }
}

/// Somebody says that a member's log reaches further than is known here: a reason to ask.
void Gossip::heard_of(double now, std::uint32_t slot, std::uint64_t seq) {
  Member& member = *members_[slot];
  if (seq <= member.hint || member.state == State::kLeft) return;
  ++counts.tips_new;
  member.hint = seq;
  if (member.repair_at == kNever) {
    member.nacks = 0;
    repair_from(slot, now + kReorderS);
  }
}

/// What follows from what a message did to a member's view.
void Gossip::settle(double now, std::uint32_t slot, const Outcome& outcome) {
  Member& member = *members_[slot];
  if (outcome.refused) {
    ++counts.snapshots_refused;
    member.refused_at = now;
  }
  if (outcome.full) {
    ++counts.over_quota;
    say_once(now, Event::Kind::kError, member.life.node, "quota",
             "entries of a member are dropped: it has more of them than one may have, or than the index may hold");
    entries_.replace(slot, {});
  }
  if (outcome.diverged) {
    ++counts.diverged;
    if (!member.hidden) hide(now, slot, "its set does not have the checksum that it says");
  } else if (member.hidden && member.state != State::kLeft && member.replica.current() &&
             now - member.last_heard <= silence_s()) {
    show(now, slot);
  } else if (!member.hidden && !member.replica.proven()) {
    hide(now, slot, "its set is not proven");
  }
  if (outcome.proven && member.replica.current()) member.proven_at = now;
  if (outcome.advanced) member.nacks = member.wants = 0;
  needs_repair(now, slot);
}

void Gossip::needs_repair(double now, std::uint32_t slot) {
  Member& member = *members_[slot];
  const Replica& replica = member.replica;
  if (!replica.diverged() && replica.hole(member.hint).size() == 0 && replica.unconfirmed() == 0) {
    member.repair_at = kNever;
    member.hint = 0;
    return;
  }
  if (member.repair_at == kNever || (member.nacks == 0 && member.wants == 0 && member.repair_at > now + kReorderS))
    repair_from(slot, now + (replica.diverged() ? 0.0 : kReorderS));
}

void Gossip::repair_from(std::uint32_t slot, double at) {
  members_[slot]->repair_at = at;
  repairs_.emplace(at, slot);
}

void Gossip::repair(double now, std::uint32_t slot) {
  Member& member = *members_[slot];
  member.repair_at = kNever;
  if (member.state == State::kLeft || leaving_) return;
  const Replica& replica = member.replica;
  Hole hole = replica.hole(member.hint);
  const bool hearsay = !replica.diverged() && !replica.behind();
  if (hole.size() == 0 && !replica.diverged()) {
    if (replica.unconfirmed() == 0) return;
    hole = {replica.unconfirmed(), replica.unconfirmed()};
  }
  if (hearsay && (member.nacks >= kHearsayNacksMost || hole.size() > kNackSpan)) {
    member.hint = 0;  // what the owner does not say itself in time is not worth more
    return;
  }
  if (replica.diverged() || hole.size() > kNackSpan || member.nacks >= kNacksMost) {
    if (now - member.refused_at < kRefusedWaitS && member.wants > 4) return repair_from(slot, now + kRefusedWaitS);
    wanting_.push_back(slot);
    return;
  }
  // What lies beyond the owner's own word needs its word, whoever else may have it.
  std::uint32_t ask = member.nacks % 2 == 0 || hole.to > replica.said() ? slot : random_member(slot);
  if (ask == 0) ask = slot;
  ++counts.nacks_out;
  send(members_[ask]->contact, encode(Nack{member.life, hole.from, hole.to}));
  const double again = std::clamp(2.5 * members_[ask]->rtt_s, kNackAgainS, kNackAgainMostS) * std::pow(kNackGrowth, member.nacks);
  repair_from(slot, now + again * random_.within(0.8, 1.2));
  ++member.nacks;
}

/// Any member that is alive, with luck; 0 when there is none.
std::uint32_t Gossip::random_member(std::uint32_t but) {
  if (count_ == 0) return 0;
  std::uint32_t any = 0;
  const std::size_t from = random_.below(members_.size());
  for (std::size_t i = 0; i < members_.size(); ++i) {
    const auto slot = static_cast<std::uint32_t>((from + i) % members_.size());
    if (slot == 0 || slot == but || !members_[slot] || members_[slot]->state == State::kLeft) continue;
    if (members_[slot]->state == State::kAlive) return slot;
    if (any == 0) any = slot;
  }
  return any;
}

void Gossip::on_nack(const Life& from, std::string_view bytes) {
  const std::uint32_t asker = slot_for(from);
  Nack nack;
  if (!decode(bytes, nack)) {
    ++counts.malformed;
    return;
  }
  if (asker == 0) {
    ++counts.unintroduced;
    return;
  }
  ++counts.nacks_in;
  const ContactId to = members_[asker]->contact;
  std::uint64_t repeats = 0;
  if (nack.owner == life_) {
    for (const auto& published : log_tail_) {
      if (published.seq < nack.from || published.seq > nack.to || !published.sent) continue;
      if (repeats++ == kRepeatsMost) break;
      ++counts.repeats_out;
      send(to, published.payload);
    }
    return;
  }
  const std::uint32_t slot = slot_for(nack.owner);
  if (slot == 0 || members_[slot]->state == State::kLeft) return;
  for (std::uint64_t seq = nack.from; seq <= nack.to && seq - nack.from < kNackSpan; ++seq) {
    const std::string_view body = members_[slot]->replica.tail(seq);
    if (body.empty()) continue;
    ++counts.relays_out;
    send(to, encode_relay(nack.owner, body));
  }
}

void Gossip::on_relay(double now, const Payload& payload) {
  Relay relay;
  if (!decode(*payload, relay)) {
    ++counts.malformed;
    return;
  }
  const std::uint32_t slot = slot_for(relay.owner);
  if (slot == 0 || members_[slot]->state == State::kLeft) return;
  settle(now, slot, members_[slot]->replica.hear(relay.delta, payload, false));
}

// --- snapshots

void Gossip::ask_snapshots(double now) {
  std::vector<std::uint32_t> slots;
  slots.swap(wanting_);
  // One or two: of the owner, then of somebody else. Many (this node has just joined): of a few others, in bulk.
  const bool bulk = slots.size() > kBulkLeast;
  std::array<std::uint32_t, kBulkSources> sources{};
  if (bulk)
    for (auto& source : sources) source = random_member(0);
  std::unordered_map<std::uint32_t, Want> asked;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    Member& member = *members_[slots[i]];
    std::uint32_t ask = slots[i];
    if (bulk)
      ask = sources[i % kBulkSources];
    else if (member.wants % 2 == 1)
      ask = random_member(slots[i]);
    if (ask == 0) ask = slots[i];
    Want& want = asked[ask];
    if (want.owners.size() >= kMembersMax) continue;
    if (want.id == 0) want.id = next_want_++;
    member.want_id = want.id;
    want.owners.push_back({member.life, member.replica.seq()});
    repair_from(slots[i], now + kWantAgainS * static_cast<double>(1U << std::min(member.wants, 3U)) * random_.within(0.8, 1.2));
    ++member.wants;
  }
  for (const auto& [ask, want] : asked) {
    ++counts.wants_out;
    letter(members_[ask]->contact, encode(want));
  }
}

void Gossip::on_want(double now, const Life& from, std::string_view bytes) {
  Want want;
  if (!decode(bytes, want)) {
    ++counts.malformed;
    return;
  }
  ++counts.wants_in;
  const ContactId to = members_[slot_for(from)]->contact;
  serve_left_ = std::min(2 * kServeBytesPerS, serve_left_ + (now - serve_at_) * kServeBytesPerS);
  serve_at_ = now;
  std::size_t bytes_out = 0;
  for (const auto& wanted : want.owners) {
    if (bytes_out >= kServeBytes || serve_left_ < static_cast<double>(bytes_out)) break;
    serve(wanted, to, bytes_out);
  }
  serve_left_ -= static_cast<double>(bytes_out);
  letter(to, encode_wanted(want.id));
}

bool Gossip::serve(const Wanted& wanted, ContactId to, std::size_t& bytes) {
  Snapshot part;
  part.owner = wanted.owner;
  std::vector<std::uint64_t> by_tier[4];
  if (wanted.owner == life_) {
    if (seq_ < wanted.have) return false;
    own_.list(0, by_tier);
    part.seq = seq_;
    part.checksum = own_.checksum(0);
  } else {
    const std::uint32_t slot = slot_for(wanted.owner);
    if (slot == 0 || members_[slot]->state == State::kLeft) return false;
    const Replica& replica = members_[slot]->replica;
    if (!replica.proven() || replica.seq() < wanted.have || replica.seq() == 0) return false;
    entries_.list(slot, by_tier);
    part.seq = replica.seq();
    part.checksum = entries_.checksum(slot);
  }
  std::uint32_t parts = 0;
  for (const auto& keys : by_tier) parts += static_cast<std::uint32_t>((keys.size() + kPartKeys - 1) / kPartKeys);
  part.parts = std::max(parts, 1U);
  for (std::size_t t = 0; t < 4; ++t) {
    for (std::size_t from = 0; from < by_tier[t].size(); from += kPartKeys) {
      part.keys = {};
      part.keys[t + 1] = {reinterpret_cast<const char*>(by_tier[t].data() + from), std::min(kPartKeys, by_tier[t].size() - from)};
      Payload payload = encode(part);
      bytes += payload->size();
      letter(to, std::move(payload));
      ++part.part;
    }
  }
  if (parts == 0) letter(to, encode(part));
  ++counts.snapshots_out;
  return true;
}

void Gossip::on_snapshot(double now, const Payload& payload) {
  Snapshot part;
  if (!decode(*payload, part)) {
    ++counts.malformed;
    return;
  }
  const std::uint32_t slot = slot_for(part.owner);
  if (slot == 0 || members_[slot]->state == State::kLeft) return;
  Member& member = *members_[slot];
  const Outcome outcome = member.replica.install(part, payload);
  if (outcome.advanced) ++counts.snapshots_in;
  if (member.replica.assembling()) repair_from(slot, now + kWantAgainS);  // it is coming: ask nobody else
  settle(now, slot, outcome);
}

/// The answer to a WANT is over: what it did not bring is asked for again.
void Gossip::on_wanted(double now, std::string_view bytes) {
  std::uint32_t id;
  if (!decode(bytes, id)) {
    ++counts.malformed;
    return;
  }
  std::vector<std::uint32_t> left;
  bool moved = false;
  for (std::uint32_t slot = 1; slot < members_.size(); ++slot) {
    if (!members_[slot] || members_[slot]->want_id != id) continue;
    members_[slot]->want_id = 0;
    if (members_[slot]->repair_at == kNever)
      moved = true;
    else
      left.push_back(slot);
  }
  for (const std::uint32_t slot : left) {
    Member& member = *members_[slot];
    if (moved) member.wants = 1;
    repair_from(slot, now + (moved ? 0.0 : 0.05 * static_cast<double>(1U << std::min(member.wants, 6U))));
  }
}

// --- digests

void Gossip::send_digest(double now, std::uint32_t slot, bool ask) {
  Digest digest;
  digest.ask = ask;
  for (const auto& member : members_) {
    if (!member || member->state == State::kLeft || digest.entries.size() >= kMembersMax) continue;
    digest.entries.push_back({member->life, member->replica.seq(),
                              static_cast<std::uint32_t>(std::min((now - member->last_heard) * 1e3, 4e9)),
                              contacts_[member->contact].address});
  }
  ++counts.digests_out;
  letter(members_[slot]->contact, encode(digest));
}

void Gossip::on_digest(double now, const Life& from, std::string_view bytes) {
  Digest digest;
  if (!decode(bytes, digest)) {
    ++counts.malformed;
    return;
  }
  ++counts.digests_in;
  for (const auto& entry : digest.entries) {
    if (entry.life.node == life_.node) continue;
    const std::uint32_t slot = slot_of(entry.life.node);
    if (slot != 0 && members_[slot]->life == entry.life) {
      const Replica& replica = members_[slot]->replica;
      if (entry.seq > std::max(replica.seq(), replica.said())) heard_of(now, slot, entry.seq);
    } else if (slot == 0 || members_[slot]->life.epoch < entry.life.epoch) {
      const ContactId id = contacts_.learn(now, entry.address);
      if (id == kNoContact) {
        ++counts.contacts_full;
      } else if (entry.age_ms < kHeardLatelyMs && now - contacts_[id].sent_at > kHelloAgainS) {
        // Somebody has just heard it: worth a HELLO before its turn (a partition heals as fast as this spreads).
        contacts_[id].next_at = std::min(contacts_[id].next_at, now);
        contacts_[id].failures = std::min(contacts_[id].failures, 1U);
      }
    }
  }
  probe(now);
  if (digest.ask) send_digest(now, slot_for(from), false);
}

}  // namespace p2pkv::gossip
