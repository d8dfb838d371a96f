// Events, the timer, and what goes out.
#include "gossip.hpp"

#include <algorithm>
#include <cstdio>

namespace p2pkv::gossip {

namespace {

constexpr double kTickS = 0.1;
constexpr double kStallS = 1.0;
constexpr double kGraceS = 1.0;  // a loaded loop reads everything that waits in its sockets in less
constexpr double kHellosPerS = 2'000;
constexpr std::size_t kLogTail = 512;
constexpr std::size_t kRecent = 256;
constexpr double kFlushPerTipS = 0.04;
constexpr int kLeaves = 3;  // a goodbye may be lost
constexpr double kSayAgainS = 30.0;
constexpr std::size_t kSaidMax = 1'024;
constexpr double kDigestJoiningS = 0.25;
constexpr double kJoiningS = 2.0;

}  // namespace

std::uint64_t Random::bits() {
  std::uint64_t x = state_ += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27U)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31U);
}

Gossip::Gossip(const Settings& settings, const Life& life, std::string address, index::Entries& entries,
               index::Entries& own, std::uint64_t seed, double now)
    : settings_(settings), life_(life), address_(std::move(address)), entries_(entries), own_(own), random_(seed),
      contacts_(2 * static_cast<std::size_t>(settings.members_max) + 64), slots_(settings.members_max), started_(now) {
  members_.resize(settings.members_max + 1);
  for (std::uint32_t slot = 1; slot <= settings.members_max; ++slot) free_slots_.push_back(slot);
  recent_.reserve(kRecent);
  // Phases are spread over the cell: its senders do not all send at once.
  flush_at_ = now + random_.within(0, settings_.flush_s);
  tick_at_ = now + random_.within(0, kTickS);
  beat_at_ = now;
  digest_at_ = now + random_.within(0.5, 1.0) * kDigestJoiningS;
  judge_from_ = now;
  hellos_left_ = kHellosPerS * kTickS;
}

double Gossip::flush_s() const {
  return std::max(settings_.flush_s, static_cast<double>(alive_) / settings_.frames_per_s);
}

double Gossip::heartbeat_s() const {
  return std::max(settings_.heartbeat_s, static_cast<double>(alive_) / settings_.frames_per_s);
}

double Gossip::silence_s() const { return std::max(settings_.silence_s, 15 * heartbeat_s()); }

const Member* Gossip::member(NodeId node) const {
  const std::uint32_t slot = slot_of(node);
  return slot == 0 ? nullptr : members_[slot].get();
}

std::vector<std::uint32_t> Gossip::slots() const {
  std::vector<std::uint32_t> out;
  for (std::uint32_t slot = 1; slot < members_.size(); ++slot)
    if (members_[slot]) out.push_back(slot);
  return out;
}

// --- events

void Gossip::set_card(double now, std::uint32_t number, std::string card) {
  card_number_ = number;
  card_ = std::move(card);
  // Whoever sees the new number in the next heartbeat asks for it; most need not, as it goes out at once.
  for (std::uint32_t slot = 1; slot < members_.size(); ++slot)
    if (const auto& member = members_[slot]; member && member->state != State::kLeft)
      send_hello(now, member->contact, member->life.instance, true, false);
  beat_at_ = std::min(beat_at_, now - heartbeat_s());
}

void Gossip::on_frame(double now, const Life& from, std::string_view source, const Payload& payload) {
  ++counts.frames_in;
  switch (static_cast<Type>(type_of(*payload))) {
    case Type::kDelta:
      return on_delta(now, from, source, payload);
    case Type::kHello:
      return on_hello(now, from, source, *payload);
    case Type::kNack:
      return on_nack(from, *payload);
    case Type::kRelay:
      if (slot_for(from) == 0) {
        ++counts.unintroduced;
        return;
      }
      return on_relay(now, payload);
    case Type::kLeave:
      if (payload->size() != 1) break;
      return on_leave(now, from);
    case Type::kStale:
      return on_stale(now, *payload);
    default:
      break;
  }
  ++counts.malformed;
}

void Gossip::on_letter(double now, const Life& from, const Payload& payload) {
  ++counts.letters_in;
  const std::uint32_t slot = slot_for(from);
  if (slot == 0 || members_[slot]->state == State::kLeft) {
    ++counts.unintroduced;
    return;
  }
  switch (static_cast<Type>(type_of(*payload))) {
    case Type::kDigest:
      return on_digest(now, from, *payload);
    case Type::kWant:
      return on_want(now, from, *payload);
    case Type::kSnapshot:
      return on_snapshot(now, payload);
    case Type::kWanted:
      return on_wanted(now, *payload);
    case Type::kCardWant:
      return letter(members_[slot]->contact, encode(CardLetter{card_number_, card_}));
    case Type::kCard: {
      CardLetter card;
      if (!decode(*payload, card)) break;
      return take_card(slot, card.number, card.card);
    }
    default:
      break;
  }
  ++counts.malformed;
}

void Gossip::on_lost(double now, NodeId node) {
  if (const std::uint32_t slot = slot_of(node); slot != 0 && !members_[slot]->hidden)
    hide(now, slot, "its connection broke, or its port refuses connections");
}

void Gossip::publish(std::uint64_t seq, std::uint64_t checksum,
                     const std::array<std::vector<std::uint64_t>, kTiers>& keys) {
  seq_ = seq;
  checksum_ = checksum;
  log_tail_.push_back({seq, encode_delta(seq, checksum, card_number_, keys), false});
  if (log_tail_.size() > kLogTail && log_tail_.front().sent) log_tail_.pop_front();
}

void Gossip::on_timer(double now) {
  const double late = now - std::min(tick_at_, flush_at_);
  if (late > kStallS) {
    ++counts.stalls;
    char text[96];
    std::snprintf(text, sizeof text, "this process stood still for %.1f s: judging nobody silent yet", late);
    say(Event::Kind::kWarning, 0, text);
    judge_from_ = now + kGraceS;
  }
  if (now >= flush_at_) {
    flush(now);
    const double every = flush_s();
    flush_at_ = std::max(flush_at_ + every, now + every / 2);
  }
  if (now >= tick_at_) {
    tick_at_ = std::max(tick_at_ + kTickS, now + kTickS / 2);
    hellos_left_ = kHellosPerS * kTickS;
    if (!leaving_) probe(now);
    if (now >= judge_from_) judge(now);
    if (now >= digest_at_) {
      digest_at_ = now + random_.within(0.75, 1.25) * (now - started_ < kJoiningS ? kDigestJoiningS : settings_.digest_s);
      if (const std::uint32_t slot = random_member(0); slot != 0 && !leaving_) send_digest(now, slot, true);
    }
  }
  while (!repairs_.empty() && repairs_.top().first <= now) {
    const auto [at, slot] = repairs_.top();
    repairs_.pop();
    if (const auto& member = members_[slot]; member && member->repair_at == at) repair(now, slot);
  }
  if (!wanting_.empty()) ask_snapshots(now);
}

void Gossip::leave(double now) {
  if (leaving_) return;
  leaving_ = true;
  leaves_left_ = kLeaves;
  flush(now);
}

void Gossip::restart(double now, const Life& life) {
  life_ = life;
  seq_ = checksum_ = 0;
  log_tail_.clear();
  started_ = now;
  for (std::uint32_t slot = 1; slot < members_.size(); ++slot) {
    if (!members_[slot]) continue;
    members_[slot]->knows_us = false;
    contacts_[members_[slot]->contact].next_at = now;
  }
  probe(now);
}

// --- out

void Gossip::flush(double now) {
  if (leaving_) {
    if (leaves_left_ > 0) {
      --leaves_left_;
      broadcast(encode_leave(), false);
    }
    return;
  }
  std::size_t i = log_tail_.size();
  while (i > 0 && !log_tail_[i - 1].sent) --i;
  for (bool first = true; i < log_tail_.size(); ++i, first = false) {
    log_tail_[i].sent = true;
    ++counts.deltas_out;
    broadcast(log_tail_[i].payload, first);
    beat_at_ = now;
  }
  if (now - beat_at_ > heartbeat_s() - flush_s() / 2) {
    beat_at_ = now;
    ++counts.heartbeats_out;
    broadcast(encode_delta(seq_, checksum_, card_number_, {}), true);
  }
}

void Gossip::broadcast(const Payload& payload, bool tips) {
  if (targets_.empty()) {
    for (std::uint8_t protocol = kProtocolMin; protocol <= kProtocolMax; ++protocol) {
      std::vector<ContactId> to;
      for (const auto& member : members_)
        if (member && member->state != State::kLeft && member->protocol == protocol) to.push_back(member->contact);
      if (!to.empty()) targets_.push_back({protocol, std::make_shared<const std::vector<ContactId>>(std::move(to))});
    }
  }
  Tip chosen[kTipsPerDelta];
  std::size_t count = 0;
  if (tips) {
    // The longer until the next delta would show a loss, the more tips are worth their bytes.
    const auto worth = static_cast<std::size_t>(flush_s() / kFlushPerTipS + 0.5);
    count = std::min({recent_.size(), kTipsPerDelta, worth});
    for (std::size_t i = 0; i < count; ++i) chosen[i] = recent_[random_.below(recent_.size())];
  }
  for (const auto& target : targets_) {
    if (target.protocol < 3 || !tips)
      frames.push_back({payload, target.to});
    else
      frames.push_back({with_tips(payload, chosen, count, target.protocol < 4 ? std::nullopt : std::optional(load_)), target.to});
  }
}

std::uint16_t Gossip::load_of(NodeId node, double now) const {
  const std::uint32_t slot = slots_.find(node);
  if (slot == 0 || !members_[slot] || now - members_[slot]->last_heard > 1.5 * heartbeat_s()) return 0;
  return members_[slot]->load;
}

void Gossip::send(ContactId to, Payload payload) {
  frames.push_back({std::move(payload), std::make_shared<const std::vector<ContactId>>(1, to)});
}

void Gossip::say_once(double now, Event::Kind level, NodeId node, const char* what, std::string text) {
  std::string key = what + std::to_string(node);
  if (said_.size() >= kSaidMax) said_.clear();
  const auto [at, added] = said_.try_emplace(std::move(key), now);
  if (!added && now - at->second < kSayAgainS) return;
  at->second = now;
  say(level, node, std::move(text));
}

}  // namespace p2pkv::gossip
