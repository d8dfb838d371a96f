// Who is there.
#include <algorithm>
#include <cstdio>

#include "gossip.hpp"

namespace p2pkv::gossip {

namespace {

constexpr double kHelloFirstS = 0.1;
constexpr double kHelloMostS = 4.0;  // a member that comes back is found within this
constexpr double kOwnAddressS = 300.0;  // it may be given to another node
constexpr double kAnswersPerS = 4'000;
constexpr double kRenewAgainS = 10.0;
constexpr double kRttMostS = 0.5;
constexpr double kBlameShare = 0.25;
constexpr std::size_t kBlameLeast = 3;
constexpr double kTogetherBeats = 3.0;

std::string hex(NodeId node) {
  char text[20];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(node));
  return text;
}

}  // namespace

Gossip::Standing Gossip::standing(const Life& life) const {
  if (life.node == life_.node) return life == life_ ? Standing::kSelf : Standing::kTwin;
  const Member* known = member(life.node);
  if (known == nullptr) return Standing::kNew;
  if (life.epoch > known->life.epoch) return Standing::kLater;
  if (life.epoch < known->life.epoch) return Standing::kEarlier;
  if (life.instance == known->life.instance) return Standing::kSame;
  return known->state == State::kAlive ? Standing::kSecond : Standing::kLater;
}

/// Where a node is reached: what it says of itself, with the host that was seen where it names none.
ContactId Gossip::contact_of(double now, std::string_view source, std::string_view advertised) {
  const std::size_t colon = advertised.rfind(':');
  std::string address(advertised);
  if (colon == std::string_view::npos) {
    address = source;
  } else {
    const std::string_view host = advertised.substr(0, colon);
    if (host.empty() || host == "*" || host == "0.0.0.0" || host == "::" || host == "[::]")
      address = std::string(source.substr(0, source.rfind(':'))) + std::string(advertised.substr(colon));
  }
  const ContactId id = contacts_.learn(now, address);
  if (id == kNoContact) ++counts.contacts_full;
  return id;
}

bool Gossip::may_answer(double now) {
  answers_left_ = std::min(kAnswersPerS, answers_left_ + (now - answers_at_) * kAnswersPerS);
  answers_at_ = now;
  if (answers_left_ < 1) {
    ++counts.hellos_suppressed;
    return false;
  }
  answers_left_ -= 1;
  return true;
}

void Gossip::send_hello(double now, ContactId to, std::uint64_t echo, bool known, bool ask) {
  contacts_[to].sent_at = now;
  Hello hello;
  hello.protocol_max = settings_.protocol_max;
  hello.ask = ask;
  hello.known = known;
  hello.echo = echo;
  hello.card_number = card_number_;
  hello.address = address_;
  hello.card = card_;
  if (card_.size() + address_.size() + 32 > kFrameBytesMax) hello.card = {};
  ++counts.hellos_out;
  send(to, encode(hello));
}

void Gossip::on_seeds(double now, std::uint32_t source, const std::vector<std::string>& addresses) {
  const std::uint32_t bit = 1U << (source % 32);
  for (ContactId id = 0; id < contacts_.end(); ++id) {
    Contact& contact = contacts_[id];
    if (contact.address.empty() || (contact.sources & bit) == 0) continue;
    contact.sources &= ~bit;
    contact.added = now;
  }
  for (const auto& address : addresses) {
    const ContactId id = contacts_.learn(now, address);
    if (id == kNoContact)
      ++counts.contacts_full;
    else
      contacts_[id].sources |= bit;
  }
  if (!leaving_) probe(now);
}

/// HELLO to whom it is due: addresses where nobody is known, and members that do not know this life yet.
void Gossip::probe(double now) {
  for (ContactId id = 0; id < contacts_.end() && hellos_left_ >= 1; ++id) {
    Contact& contact = contacts_[id];
    if (contact.address.empty() || contact.next_at > now || contact.own_until > now) continue;
    const Member* there = contact.slot != 0 ? members_[contact.slot].get() : nullptr;
    if (there != nullptr && there->state == State::kLeft) {
      if (contact.sources == 0) continue;
      there = nullptr;  // discovery still names the address: somebody else may come to it
    }
    if (there != nullptr && (there->knows_us || there->contact != id)) continue;
    if (there == nullptr && contact.sources == 0 && contact.failures > 0 &&
        now - contact.added > (contact.answered ? settings_.forget_s : settings_.purge_s)) {
      contacts_.forget(id);
      continue;
    }
    hellos_left_ -= 1;
    const double wait = std::min(kHelloMostS, kHelloFirstS * static_cast<double>(1U << std::min(contact.failures, 10U)));
    contact.next_at = now + wait * random_.within(0.75, 1.0);
    ++contact.failures;
    send_hello(now, id, there != nullptr ? there->life.instance : 0, there != nullptr, true);
  }
}

void Gossip::on_hello(double now, const Life& from, std::string_view source, std::string_view bytes) {
  Hello hello;
  if (!decode(bytes, hello)) {
    ++counts.malformed;
    return;
  }
  const Standing standing = this->standing(from);
  if (standing == Standing::kSelf) {
    const ContactId id = contacts_.find(source);
    if (id != kNoContact) contacts_[id].own_until = now + kOwnAddressS;
    if (const ContactId advertised = contact_of(now, source, hello.address); advertised != kNoContact)
      contacts_[advertised].own_until = now + kOwnAddressS;
    return;
  }
  if (std::max(hello.protocol_min, kProtocolMin) > std::min(hello.protocol_max, settings_.protocol_max)) {
    ++counts.protocol;
    say_once(now, Event::Kind::kError, from.node, "protocol",
             "refused " + hex(from.node) + " at " + std::string(source) + ": it speaks protocols " +
                 std::to_string(hello.protocol_min) + ".." + std::to_string(hello.protocol_max));
    return;
  }
  ContactId back = contacts_.learn(now, source);
  if (back == kNoContact) {
    ++counts.contacts_full;
    return;
  }
  if (standing == Standing::kTwin || standing == Standing::kEarlier || standing == Standing::kSecond)
    return tell_stale(now, from, back);
  const std::uint32_t slot = standing == Standing::kSame ? slot_of(from.node) : 0;
  if (slot != 0 && members_[slot]->state == State::kLeft) return;  // a life that has left does not come back
  if (hello.echo == life_.instance && !leaving_) {
    introduce(now, from, standing, source, hello);
  } else if (!leaving_ && contacts_[back].slot == 0) {
    contacts_[back].next_at = now + kHelloFirstS;  // the answer below is as good as a HELLO of our own
  }
  if (hello.ask && !leaving_ && may_answer(now)) {
    const std::uint32_t known = slot_for(from);
    if (known != 0) back = members_[known]->contact;
    send_hello(now, back, from.instance, known != 0, known == 0 || !members_[known]->knows_us);
  }
}

void Gossip::introduce(double now, const Life& from, Standing standing, std::string_view source, const Hello& hello) {
  std::uint32_t slot = slot_of(from.node);
  if (standing == Standing::kLater) {
    ++counts.renewed;
    const ContactId here = contact_of(now, source, hello.address);
    const bool twice = members_[slot]->state == State::kAlive && members_[slot]->contact != here;
    if (twice)
      say(Event::Kind::kError, from.node,
          hex(from.node) + ": a later epoch has come from another address while the earlier one was alive: is one identity "
          "used twice? The later one counts");
    remove_member(now, slot);
    events.push_back({Event::Kind::kRenewed, from.node, slot, from.epoch, {}});
    slot = 0;
  }
  const ContactId contact = contact_of(now, source, hello.address);  // not before: a life that goes takes its own along
  if (contact == kNoContact) return;
  if (slot == 0) {
    slot = take_slot();
    if (slot == 0) {
      ++counts.full;
      say_once(now, Event::Kind::kError, 0, "full",
               "refused " + hex(from.node) + " at " + std::string(source) + ": the member table is full");
      return;
    }
    members_[slot] = std::make_unique<Member>(from, entries_, slot, settings_.entries_per_owner_max);
    slots_.put(from, slot);
    ++count_;
    members_[slot]->since = members_[slot]->last_heard = now;
    entries_.hide(slot, true);
    events.push_back({Event::Kind::kMet, from.node, slot, from.epoch, {}});
    changed();
  }
  Member& member = *members_[slot];
  for (const ContactId id : {contact, contacts_.find(source)}) {
    // Of the last HELLO that it may be the answer to: never less than the round trip, but for an answer to an older one.
    const double took = id == kNoContact ? kNever : now - contacts_[id].sent_at;
    if (took < kRttMostS && (took < member.rtt_s || !member.has_rtt)) {
      member.rtt_s = took;
      member.has_rtt = true;
    }
  }
  const auto protocol = std::min(hello.protocol_max, settings_.protocol_max);
  if (member.contact != contact || member.protocol != protocol) {
    member.contact = contact;
    member.protocol = protocol;
    changed();
  }
  member.knows_us |= hello.known;
  for (const ContactId id : {contact, contacts_.find(source)}) {
    if (id == kNoContact) continue;
    contacts_[id].slot = slot;
    contacts_[id].failures = 0;
    contacts_[id].added = now;
    contacts_[id].answered = true;
    contacts_[id].next_at = now + 2 * kHelloFirstS;
  }
  if (!hello.card.empty())
    take_card(slot, hello.card_number, hello.card);
  else if (!member.has_card || member.card_number != hello.card_number)
    letter(contact, encode_card_want());
}

/// A free slot, the longest free one first; one that a member gives way for; 0.
std::uint32_t Gossip::take_slot() {
  if (free_slots_.empty()) {
    std::uint32_t victim = 0;
    for (std::uint32_t slot = 1; slot < members_.size(); ++slot) {
      if (members_[slot]->state == State::kAlive) continue;
      if (victim == 0 || members_[slot]->since < members_[victim]->since) victim = slot;
    }
    if (victim == 0) return 0;
    remove_member(members_[victim]->since, victim);
  }
  const std::uint32_t slot = free_slots_.front();
  free_slots_.pop_front();
  return slot;
}

void Gossip::remove_member(double now, std::uint32_t slot) {
  Member& member = *members_[slot];
  if (!member.hidden) hide(now, slot, "forgotten");
  entries_.remove(slot);
  slots_.erase(member.life.node);
  --count_;
  const bool left = member.state == State::kLeft;
  for (ContactId id = 0; id < contacts_.end(); ++id) {
    Contact& contact = contacts_[id];
    if (contact.address.empty() || contact.slot != slot) continue;
    contact.slot = 0;
    contact.failures = 0;
    contact.added = contact.next_at = now;
    if (left && contact.sources == 0) contacts_.forget(id);
  }
  members_[slot].reset();
  free_slots_.push_back(slot);
  changed();
}

void Gossip::take_card(std::uint32_t slot, std::uint32_t number, std::string_view card) {
  Member& member = *members_[slot];
  if (member.has_card && (number < member.card_number || (number == member.card_number && card == member.card))) return;
  member.has_card = true;
  member.card_number = number;
  member.card = card;
  events.push_back({Event::Kind::kCard, member.life.node, slot, number, {}});
}

void Gossip::tell_stale(double now, const Life& from, ContactId to) {
  const Member* known = member(from.node);
  Stale stale;
  stale.to = from.instance;
  if (from.node == life_.node) {
    ++counts.twin;
    say_once(now, Event::Kind::kError, from.node, "twin",
             "another process has this node's identity: " + contacts_[to].address + ", epoch " +
                 std::to_string(from.epoch) + "; give each agent a state_dir of its own");
    if (from.epoch > life_.epoch) return;
    stale.epoch = life_.epoch;
    stale.instance = life_.instance;
  } else {
    if (known == nullptr) return;
    ++(from.epoch == known->life.epoch ? counts.duplicate : counts.stale);
    if (from.epoch == known->life.epoch)
      say_once(now, Event::Kind::kError, from.node, "duplicate",
               "refused " + hex(from.node) + " at " + contacts_[to].address + ": its id and epoch are taken by " +
                   contacts_[known->contact].address);
    stale.epoch = known->life.epoch;
    stale.instance = known->life.instance;
    stale.age_ms = static_cast<std::uint32_t>(std::min((now - known->last_heard) * 1e3, 4e9));
  }
  if (may_answer(now)) send(to, encode(stale));
}

void Gossip::on_stale(double now, std::string_view bytes) {
  Stale stale;
  if (!decode(bytes, stale)) {
    ++counts.malformed;
    return;
  }
  if (stale.to != life_.instance || stale.epoch < life_.epoch || stale.instance == life_.instance) return;
  if (stale.age_ms < silence_s() * 1e3) {
    say_once(now, Event::Kind::kError, life_.node, "taken",
             "this node's id is used by another process, alive as epoch " + std::to_string(stale.epoch) +
                 ": give each agent a state_dir of its own");
    return;
  }
  if (now - renewed_at_ < kRenewAgainS) return;
  renewed_at_ = now;
  ++counts.renewals;
  say(Event::Kind::kWarning, life_.node,
      "others know a later life of this node, epoch " + std::to_string(stale.epoch) + ": beginning a new one after it");
  events.push_back({Event::Kind::kRenew, life_.node, 0, stale.epoch, {}});
}

void Gossip::on_leave(double now, const Life& from) {
  const std::uint32_t slot = slot_for(from);
  if (slot == 0 || members_[slot]->state == State::kLeft) return;
  ++counts.left;
  Member& member = *members_[slot];
  if (!member.hidden) hide(now, slot, "left");
  entries_.remove(slot);
  entries_.hide(slot, true);
  member.state = State::kLeft;
  member.since = now;
  member.repair_at = kNever;
  events.push_back({Event::Kind::kLeft, from.node, slot, from.epoch, {}});
  changed();
}

/// A frame of a life that is no member: find out who it is.
void Gossip::unknown(double now, const Life& from, std::string_view source) {
  ++counts.unintroduced;
  if (leaving_) return;
  const Standing standing = this->standing(from);
  if (standing == Standing::kSelf || standing == Standing::kSame) return;
  const ContactId id = contacts_.learn(now, source);
  if (id == kNoContact) {
    ++counts.contacts_full;
    return;
  }
  if (standing == Standing::kEarlier || standing == Standing::kSecond || standing == Standing::kTwin)
    return tell_stale(now, from, id);
  // Somebody is there for certain, so the wait between HELLOs begins anew.
  Contact& contact = contacts_[id];
  if (now - contact.sent_at < kHelloFirstS) return;
  contact.next_at = now + kHelloFirstS;
  contact.failures = 1;
  contact.own_until = 0;
  send_hello(now, id, from.instance, false, true);
}

void Gossip::show(double now, std::uint32_t slot) {
  Member& member = *members_[slot];
  member.hidden = false;
  member.state = State::kAlive;
  member.since = now;
  member.pardon_until = 0;
  ++alive_;
  ++counts.shown;
  entries_.hide(slot, false);
  events.push_back({Event::Kind::kShown, member.life.node, slot, member.replica.seq(), {}});
}

void Gossip::hide(double now, std::uint32_t slot, const std::string& why) {
  Member& member = *members_[slot];
  member.hidden = true;
  member.state = State::kUnreachable;
  member.since = now;
  --alive_;
  ++counts.hidden;
  entries_.hide(slot, true);
  events.push_back({Event::Kind::kHidden, member.life.node, slot, member.life.epoch, why});
}

/// Rules 4 and 7.
void Gossip::judge(double now) {
  const double silence = silence_s();
  std::vector<std::uint32_t> silent;
  std::size_t quiet = 0;  // silent, or about to be: those that end together do not fall silent in the same moment
  for (std::uint32_t slot = 1; slot < members_.size(); ++slot) {
    if (!members_[slot]) continue;
    const Member& member = *members_[slot];
    if (member.state == State::kAlive) {
      if (now - member.last_heard > silence) silent.push_back(slot);
      quiet += now - member.last_heard > silence - kTogetherBeats * heartbeat_s();
    } else if (now - member.since > settings_.purge_s) {
      ++counts.purged;
      events.push_back({Event::Kind::kPurged, member.life.node, slot, 0, {}});
      remove_member(now, slot);
    }
  }
  if (silent.empty()) return;
  const bool many = quiet > kBlameLeast && static_cast<double>(quiet) > kBlameShare * static_cast<double>(alive_);
  if (many && now - pardoned_at_ > 2 * silence) {
    pardoned_at_ = now;
    say(Event::Kind::kWarning, 0,
        std::to_string(quiet) + " of " + std::to_string(alive_) +
            " members fell silent at once: this node may be to blame, and waits as long again");
  }
  for (const std::uint32_t slot : silent) {
    Member& member = *members_[slot];
    if (many && member.pardon_until == 0) {
      ++counts.pardoned;
      member.pardon_until = member.last_heard + 2 * silence;
    }
    if (now < member.pardon_until) continue;
    member.pardon_until = 0;
    ++counts.silent;
    char text[48];
    std::snprintf(text, sizeof text, "silent for %.1f s", now - member.last_heard);
    hide(now, slot, text);
  }
}

}  // namespace p2pkv::gossip
