#include "simulation.hpp"

#include "node.hpp"

#include <algorithm>
#include <cstdio>

namespace p2pkv::sim {

using gossip::Type;

namespace {

constexpr std::size_t kViolationsMax = 20;
constexpr double kSettleS = 2.0;  // after a start or a stall, before a node counts as healthy

std::string text_of(const char* format, auto... values) {
  char text[256];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

}  // namespace

Simulation::Simulation(const Options& options) : options_(options), random_(options.seed) {
  cuts_.assign(static_cast<std::size_t>(options_.nodes) * options_.nodes, false);
  cut_until_.assign(cuts_.size(), 0);
  for (std::uint32_t i = 0; i < options_.nodes; ++i) {
    auto node = std::make_unique<Node>();
    node->index = i;
    node->id = random_.bits() >> 1U | 1U;
    node->address = text_of("10.%u.%u.%u:7841", i >> 16U, i >> 8U & 255U, i & 255U);
    by_address_[node->address] = i;
    by_id_[node->id] = i;
    nodes_.push_back(std::move(node));
  }
  accounted_at_ = now_;
}

Simulation::~Simulation() = default;

// --- time

void Simulation::push(double at, std::uint32_t node, Kind kind, std::uint32_t what) {
  queue_.push({at, order_++, node, what, kind});
}

void Simulation::run(double seconds) {
  const double end = now_ + seconds;
  while (!queue_.empty() && queue_.top().at <= end && results.violations.size() < kViolationsMax) {
    const Event event = queue_.top();
    queue_.pop();
    now_ = event.at;
    ++results.events;
    trace_ = index::mix64(trace_ ^ (static_cast<std::uint64_t>(event.node) << 8U | static_cast<std::uint64_t>(event.kind)) ^
                          static_cast<std::uint64_t>(event.at * 1e9));
    handle(event);
  }
  now_ = end;
  account();
}

void Simulation::account() {
  results.pair_seconds += (now_ - accounted_at_) * healthy_ * (healthy_ > 0 ? healthy_ - 1 : 0);
  accounted_at_ = now_;
  healthy_ = 0;
  for (const auto& node : nodes_) healthy_ += node->up && node->stalled_until <= now_;
}

void Simulation::handle(const Event& event) {
  Node& node = *nodes_[event.node];
  switch (event.kind) {
    case Kind::kFrame:
    case Kind::kLetter:
      return arrive(event.node, event.what);
    case Kind::kTimer:
      if (!node.up || event.what != node.generation || event.at != node.armed) return;
      if (node.stalled_until > now_) return;  // resumed later
      return timer(node);
    case Kind::kStart:
      if (!node.up && event.what == node.generation) start(event.node);
      return;
    case Kind::kResume:
      if (!node.up || event.what != node.generation || node.stalled_until > now_) return;
      account();
      node.disturbed_at = now_;
      if (random_.unit() < 0.5) timer(node);
      drain(node);
      return timer(node);
  }
}

void Simulation::arm(Node& node) {
  const double at = std::max(node.core->next_timer(), now_);
  if (at == node.armed) return;
  node.armed = at;
  push(at, node.index, Kind::kTimer, node.generation);
}

void Simulation::timer(Node& node) {
  node.armed = gossip::kNever;
  Gossip& core = *node.core;
  if (core.flush_due(now_) && !node.leaving) {
    if (options_.changes_per_s > 0 && now_ > node.wrote_at) {
      node.owed += (now_ - node.wrote_at) * options_.changes_per_s;
      const double since = node.wrote_at;
      const auto count = static_cast<std::uint32_t>(node.owed);
      node.owed -= count;
      const std::size_t before = node.pending.size();
      write(node.index, count, true);
      for (std::size_t i = before; i < node.pending.size(); ++i)
        node.pending[i].born = static_cast<float>(random_.within(since, now_) - 1'000.0);
    }
    node.wrote_at = now_;
    for (std::size_t from = 0; from < node.pending.size(); from += gossip::kKeysPerDelta) {
      std::array<std::vector<std::uint64_t>, gossip::kTiers> keys;
      History& history = *node.history;
      History::Batch batch;
      const std::size_t to = std::min(node.pending.size(), from + gossip::kKeysPerDelta);
      for (std::size_t i = from; i < to; ++i) {
        const auto& change = node.pending[i];
        keys[change.tier].push_back(change.key);
        history.changes.emplace_back(change.key, change.tier);
        if (measuring_) batch.born.push_back(change.born);
      }
      for (std::uint32_t tier = 0; tier < gossip::kTiers; ++tier)
        node.own->apply(0, keys[tier].data(), keys[tier].size(), tier);
      ++node.seq;
      history.checksums.push_back(node.own->checksum(0));
      history.ends.push_back(history.changes.size());
      batch.published = now_;
      if (measuring_)
        for (const auto& other : nodes_) batch.left += other->up && other->index != node.index;
      history.batches.push_back(std::move(batch));
      core.publish(node.seq, node.own->checksum(0), keys);
    }
    node.pending.clear();
    node.pending_at.clear();
  }
  core.on_timer(now_);
  drain(node);
  if (options_.whole_sets) check_dead(node);
}

/// Nobody shows the dead for long: silence, the pardon of rule 7, and a grace after a stall of its own.
void Simulation::check_dead(Node& node) {
  const double longest = 2 * node.core->silence_s() + 2.0;
  if (now_ - std::max(node.disturbed_at, node.started_at) < longest) return;
  for (const std::uint32_t slot : node.core->slots()) {
    const gossip::Member& member = *node.core->member_at(slot);
    if (member.hidden) continue;
    const auto found = histories_.find(member.life);
    if (found != histories_.end() && found->second->ended_at + longest < now_)
      violation(text_of("node %u shows node %u, dead for %.1f s", node.index, by_id_.at(member.life.node),
                        now_ - found->second->ended_at));
  }
}

/// What the core asks for, and what waited in the socket; then its timer.
void Simulation::drain(Node& node) {
  Gossip& core = *node.core;
  std::vector<std::uint32_t> waiting;
  waiting.swap(node.socket);
  for (const std::uint32_t flight : waiting) {
    if (node.up) deliver(node, flights_[flight]);
    release(flight);
  }
  const auto frames = std::move(core.frames);
  const auto letters = std::move(core.letters);
  const auto events = std::move(core.events);
  core.frames.clear();
  core.letters.clear();
  core.events.clear();
  for (const auto& frame : frames) send_frame(node, frame);
  for (const auto& letter : letters) send_letter(node, letter);
  for (const auto& event : events) {
    if (event.slot != 0) look(node, event.slot);
    note(node, event);
  }
  if (node.up) arm(node);
}

// --- the network

double Simulation::latency() {
  return options_.latency_s * random_.within(0.5, 1.5) * (random_.unit() < options_.late ? 10.0 : 1.0);
}

std::uint32_t Simulation::fly(Payload payload, Node& node, bool letter) {
  std::uint32_t id;
  if (free_flights_.empty()) {
    id = static_cast<std::uint32_t>(flights_.size());
    flights_.emplace_back();
  } else {
    id = free_flights_.back();
    free_flights_.pop_back();
  }
  flights_[id] = {std::move(payload), node.core->life(), node.index, 0, 1, letter};
  return id;
}

void Simulation::release(std::uint32_t flight) {
  if (--flights_[flight].uses != 0) return;
  flights_[flight].payload.reset();
  free_flights_.push_back(flight);
}

std::uint32_t Simulation::node_at(const std::string& address) const {
  const auto found = by_address_.find(address);
  return found == by_address_.end() ? options_.nodes : found->second;
}

bool Simulation::is_cut(std::uint32_t from, std::uint32_t to) const {
  return any_cut_ && cuts_[static_cast<std::size_t>(from) * options_.nodes + to];
}

void Simulation::send_frame(Node& node, const gossip::FrameOut& out) {
  const bool relay = gossip::type_of(*out.payload) == static_cast<std::uint8_t>(Type::kRelay);
  const Payload payload = relay && random_.unit() < options_.lies ? lie(out.payload) : out.payload;
  if (payload->size() > gossip::kFrameBytesMax) violation(text_of("a frame of %zu bytes", payload->size()));
  const std::uint32_t id = fly(payload, node, false);
  const std::uint64_t counter = flights_[id].counter = node.counter.take();
  if (node.counted && counter <= node.last_counter)
    violation(text_of("node %u used counter %llu twice", node.index, static_cast<unsigned long long>(counter)));
  node.counted = true;
  node.last_counter = counter;
  for (const gossip::ContactId to : *out.to) {
    const std::uint32_t there = node_at(node.core->address_of(to));
    if (there == options_.nodes) continue;
    if (is_cut(node.index, there) || random_.unit() < options_.loss || (options_.corrupt > 0 && random_.unit() < options_.corrupt)) {
      ++results.lost;
      continue;
    }
    const int copies = options_.doubled > 0 && random_.unit() < options_.doubled ? 2 : 1;
    for (int copy = 0; copy < copies; ++copy) {
      ++flights_[id].uses;
      push(now_ + latency(), there, Kind::kFrame, id);
    }
  }
  if (options_.recorded > 0 && !calm_ && random_.unit() < 0.2) {
    if (recorded_.size() < options_.recorded) {
      ++flights_[id].uses;
      recorded_.push_back(id);
    } else if (random_.unit() < 0.2) {
      const std::size_t which = random_.below(recorded_.size());
      release(recorded_[which]);
      recorded_.erase(recorded_.begin() + static_cast<std::ptrdiff_t>(which));
    }
  }
  release(id);
}

void Simulation::send_letter(Node& node, const gossip::LetterOut& out) {
  const std::uint32_t there = node_at(node.core->address_of(out.to));
  if (there == options_.nodes || is_cut(node.index, there) || is_cut(there, node.index)) return;
  const bool snapshot = gossip::type_of(*out.payload) == static_cast<std::uint8_t>(Type::kSnapshot);
  const std::uint32_t id = fly(snapshot && random_.unit() < options_.lies ? lie(out.payload) : out.payload, node, true);
  node.card_free = std::max(node.card_free, now_) + static_cast<double>(out.payload->size()) * 8 / options_.bits_per_s;
  double at = node.card_free + 2 * latency();
  if (random_.unit() < std::min(0.5, 3 * options_.loss)) at += random_.within(0.02, 0.3);  // sent again by TCP
  double& before = node.letters_until[there];
  before = at = std::max(at, before);
  push(at, there, Kind::kLetter, id);
}

void Simulation::arrive(std::uint32_t to, std::uint32_t flight) {
  Node& node = *nodes_[to];
  if (!node.up || is_cut(flights_[flight].source, to)) {
    release(flight);
    return;
  }
  if (node.stalled_until > now_) {
    if (node.socket.size() >= options_.socket_frames && !flights_[flight].letter) {
      ++results.overflowed;
      release(flight);
    } else {
      node.socket.push_back(flight);
    }
    return;
  }
  deliver(node, flights_[flight]);
  release(flight);
  drain(node);
}

void Simulation::deliver(Node& node, const Flight& flight) {
  const std::size_t bytes = flight.payload->size();
  const Life from = flight.from;  // the flights may move
  const Payload payload = flight.payload;
  if (flight.letter) {
    ++results.letters;
    results.letter_bytes += bytes;
    node.core->on_letter(now_, from, payload);
  } else {
    ++results.frames;
    results.frame_bytes += bytes + gossip::kSealBytes;
    if (options_.windows) {
      auto& window = node.windows[from];
      if (!window.fresh(flight.counter)) {
        ++results.refused_replays;
        return;
      }
      window.use(flight.counter);
      if (options_.recorded > 0) node.had[from].insert(flight.counter);
    }
    node.core->on_frame(now_, from, nodes_[flight.source]->address, payload);
  }
  if (options_.whole_sets) {
    for (const std::uint32_t slot : node.core->slots()) look(node, slot);
  } else if (const std::uint32_t slot = node.core->slot_of(from.node); slot != 0) {
    // A view that has not moved is as right as it was.
    if (node.core->member_at(slot)->replica.seq() != node.seen[slot]) look(node, slot);
    const auto type = static_cast<Type>(gossip::type_of(*payload));
    if (type == Type::kRelay || type == Type::kSnapshot) {
      NodeId owner;
      std::memcpy(&owner, payload->data() + 1, sizeof owner);
      if (const std::uint32_t whose = node.core->slot_of(owner); whose != 0) look(node, whose);
    }
  }
}

Payload Simulation::lie(const Payload& payload) {
  auto text = std::make_shared<std::string>(*payload);
  gossip::Snapshot part;
  if (gossip::type_of(*payload) == static_cast<std::uint8_t>(Type::kSnapshot) && gossip::decode(*payload, part)) {
    std::size_t keys = 0;
    for (const auto& group : part.keys) keys += group.count;
    if (keys == 0) return payload;
    (*text)[text->size() - 1 - random_.below(8)] ^= static_cast<char>(1U << random_.below(8));
    if (part.parts == 1 && random_.unit() < 0.5) {  // a lie that is consistent
      gossip::decode(*text, part);
      part.checksum = 0;
      for (std::uint32_t tier = 1; tier < gossip::kTiers; ++tier)
        for (std::size_t i = 0; i < part.keys[tier].count; ++i)
          part.checksum ^= index::entry_checksum(index::Keys(part.keys[tier].data, part.keys[tier].count)[i], tier);
      return gossip::encode(part);
    }
    return text;
  }
  (*text)[text->size() - 1 - random_.below(8)] ^= static_cast<char>(1U << random_.below(8));
  return text;
}

// --- processes

void Simulation::begin(std::uint32_t i, std::uint32_t epoch) {
  Node& node = *nodes_[i];
  if (node.history != nullptr) node.history->ended_at = std::min(node.history->ended_at, now_);
  node.epoch = epoch;
  const Life life{node.id, epoch, random_.bits() | 1U};
  auto& history = histories_[life];
  history = std::make_unique<History>();
  node.history = history.get();
  node.counter = gossip::FrameCounter();
  node.counted = false;
  node.seq = 0;
  node.own->remove(0);
  node.pending.clear();
  node.pending_at.clear();
  for (const auto& [key, tier] : node.keys) node.pending.push_back({key, tier, static_cast<float>(now_ - 1'000.0)});
  node.wrote_at = now_;
  if (node.core) {  // it goes on under another name
    node.core->restart(now_, life);
  } else {
    node.core = std::make_unique<Gossip>(options_.settings, life, node.address, *node.entries, *node.own, random_.bits(), now_);
    node.core->set_card(now_, 1, "card");
    std::vector<std::string> seeds;
    for (std::uint32_t s = 0; s < std::min(options_.seeds, options_.nodes); ++s) seeds.push_back(nodes_[s]->address);
    node.core->on_seeds(now_, 0, seeds);
  }
}

void Simulation::start(std::uint32_t i) {
  Node& node = *nodes_[i];
  if (node.up) return;
  account();
  node.up = true;
  node.leaving = false;
  node.disturbed_at = node.started_at = now_;
  node.stalled_until = 0;
  ++node.generation;
  const std::size_t slots = options_.settings.members_max + 1;
  node.core.reset();
  node.windows.clear();
  node.had.clear();
  node.letters_until.clear();
  node.seen.assign(slots, 0);
  node.keys.clear();
  if (options_.whole_sets) {
    node.whole = std::make_unique<WholeSets>(slots);
    node.own_whole = std::make_unique<WholeSets>(1);
    node.entries = node.whole.get();
    node.own = node.own_whole.get();
  } else {
    const auto list = [this](const History& history, std::uint64_t seq, std::vector<std::uint64_t>(&by_tier)[4]) {
      Set set;
      for (std::size_t at = 0; at < history.ends[seq]; ++at) {
        const auto& [key, tier] = history.changes[at];
        if (tier == 0)
          set.erase(key);
        else
          set[key] = tier;
      }
      for (const auto& [key, tier] : set) by_tier[tier - 1].push_back(key);
    };
    Node* self = &node;
    node.sums = std::make_unique<SumSets>(slots, [this, self, list](std::uint32_t slot, std::vector<std::uint64_t>(&out)[4]) {
      const gossip::Member* member = self->core->member_at(slot);
      list(*histories_.at(member->life), member->replica.seq(), out);
    });
    node.own_sums = std::make_unique<SumSets>(1, [self, list](std::uint32_t, std::vector<std::uint64_t>(&out)[4]) {
      list(*self->history, self->seq, out);
    });
    node.entries = node.sums.get();
    node.own = node.own_sums.get();
  }
  begin(i, node.epoch + 1);
  account();
  drain(node);
}

void Simulation::restore(std::uint32_t i) {
  Node& node = *nodes_[i];
  if (node.up) crash(i);
  node.epoch = node.epoch >= 2 ? node.epoch - 2 : 0;  // start() adds one
  start(i);
}

void Simulation::crash(std::uint32_t i) {
  Node& node = *nodes_[i];
  if (!node.up) return;
  account();
  node.up = false;
  node.history->ended_at = now_;
  node.crashed_at = node.last_hidden = now_;
  ++node.generation;
  for (const std::uint32_t flight : node.socket) release(flight);
  node.socket.clear();
  account();
}

void Simulation::leave(std::uint32_t i) {
  Node& node = *nodes_[i];
  if (!node.up || node.leaving) return;
  node.leaving = true;
  node.core->leave(now_);
  drain(node);
}

void Simulation::stall(std::uint32_t i, double seconds) {
  Node& node = *nodes_[i];
  if (!node.up) return;
  account();
  node.stalled_until = std::max(node.stalled_until, now_ + seconds);
  node.disturbed_at = now_;
  push(node.stalled_until, i, Kind::kResume, node.generation);
  account();
}

void Simulation::cut(std::uint32_t from, std::uint32_t to, bool is_cut) {
  const std::size_t pair = static_cast<std::size_t>(from) * options_.nodes + to;
  if (cuts_[pair] && !is_cut) cut_until_[pair] = now_;
  cuts_[pair] = is_cut;
  any_cut_ = any_cut_ || is_cut;
}

void Simulation::heal() {
  for (std::size_t pair = 0; pair < cuts_.size(); ++pair)
    if (cuts_[pair]) cut_until_[pair] = now_;
  cuts_.assign(cuts_.size(), false);
  any_cut_ = false;
}

bool Simulation::up(std::uint32_t i) const { return nodes_[i]->up; }

void Simulation::write(std::uint32_t i, std::uint32_t changes, bool removals) {
  Node& node = *nodes_[i];
  if (!node.up || node.leaving) return;
  const auto born = static_cast<float>(now_ - 1'000.0);
  const auto change = [&](std::uint64_t key, std::uint32_t tier) {
    const auto [at, added] = node.pending_at.try_emplace(key, node.pending.size());
    if (added)
      node.pending.push_back({key, tier, born});
    else
      node.pending[at->second].tier = tier;
  };
  for (std::uint32_t n = 0; n < changes; ++n) {
    const bool old = removals && !node.keys.empty() && random_.unit() < 0.5;
    if (!old) {
      const auto tier = static_cast<std::uint32_t>(1 + random_.below(4));
      const std::uint64_t key = random_.bits() << 3U | tier;
      node.keys.emplace_back(key, tier);
      change(key, tier);
      continue;
    }
    const std::size_t which = random_.below(node.keys.size());
    auto& [key, tier] = node.keys[which];
    // Only what others know already: a key that was never told of needs no removal (the log's own business).
    if (!options_.whole_sets && node.pending_at.contains(key)) continue;
    if (options_.whole_sets && random_.unit() < 0.3) {
      tier = static_cast<std::uint32_t>(1 + random_.below(4));
      change(key, tier);
      continue;
    }
    change(key, 0);
    node.keys[which] = node.keys.back();
    node.keys.pop_back();
  }
}

// --- what must hold

void Simulation::violation(const std::string& text) {
  if (results.violations.size() < kViolationsMax)
    results.violations.push_back(text_of("at %.3f s: ", now_ - 1'000.0) + text);
}

Simulation::Node* Simulation::owner_of(NodeId id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : nodes_[found->second].get();
}

bool Simulation::healthy_pair(const Node& reader, const Node& owner) const {
  const double before = now_ - options_.settings.silence_s - kSettleS;
  if (!reader.up || !owner.up || owner.leaving || owner.stalled_until > now_ || owner.disturbed_at > before) return false;
  const std::size_t pair = static_cast<std::size_t>(owner.index) * options_.nodes + reader.index;
  return !cuts_[pair] && cut_until_[pair] <= before;
}

/// Invariant 2: what is shown of an owner at (life, seq) is the owner's set there.
void Simulation::check(Node& node, std::uint32_t slot) {
  const gossip::Member* member = node.core->member_at(slot);
  if (member == nullptr) return;
  ++results.checks;
  if (member->state == gossip::State::kAlive && member->hidden) violation("a member is alive and hidden");
  if (options_.whole_sets && node.whole->hidden(slot) != member->hidden) violation("hidden in one place only");
  if (member->hidden) return;
  const auto found = histories_.find(member->life);
  if (found == histories_.end()) return violation("a member that never was");
  const History& history = *found->second;
  if (history.ended_at < node.started_at)
    return violation(text_of("node %u shows a life of node %u that ended before its own began", node.index, by_id_.at(member->life.node)));
  const std::uint64_t seq = member->replica.seq();
  if (seq >= history.checksums.size()) return violation("a sequence number that never was");
  if (node.entries->checksum(slot) != history.checksums[seq])
    violation(text_of("node %u shows node %u otherwise than it was at %llu", node.index, by_id_.at(member->life.node),
                      static_cast<unsigned long long>(seq)));
}

/// After something happened to a member's view: check it, and note what has become visible.
void Simulation::look(Node& node, std::uint32_t slot) {
  if (!node.core) return;
  check(node, slot);
  const gossip::Member* member = node.core->member_at(slot);
  if (member == nullptr) {
    node.seen[slot] = 0;
    return;
  }
  const std::uint64_t seq = member->replica.seq();
  if (seq < node.seen[slot]) node.seen[slot] = 0;
  if (seq == node.seen[slot] || member->hidden) return;
  const auto found = histories_.find(member->life);
  if (found == histories_.end()) return;
  History& history = *found->second;
  for (std::uint64_t s = node.seen[slot] + 1; s <= seq && s < history.batches.size(); ++s) {
    results.useful_bytes += (history.ends[s] - history.ends[s - 1]) * 8;
    History::Batch& batch = history.batches[s];
    if (batch.left == 0 || --batch.left != 0) continue;
    for (const float born : batch.born) results.visible_ms.push_back(static_cast<float>((now_ - 1'000.0 - born) * 1e3));
    batch.born = {};
  }
  node.seen[slot] = seq;
}

void Simulation::note(Node& node, const gossip::Event& event) {
  using What = gossip::Event::Kind;
  trace_ = index::mix64(trace_ ^ event.node ^ static_cast<std::uint64_t>(event.kind));
  switch (event.kind) {
    case What::kHidden: {
      Node* owner = owner_of(event.node);
      if (owner == nullptr) return;
      owner->last_hidden = now_;
      if (event.text.starts_with("silent")) ++results.marks;
      const gossip::Member* member = node.core->member_at(event.slot);
      const bool same = event.slot == 0 || member == nullptr || member->life == owner->core->life();
      if (same && healthy_pair(node, *owner) && !event.text.starts_with("its ") && event.text != "left" &&
          event.text != "forgotten") {
        ++results.false_marks;
        if (calm_ || options_.whole_sets)
          violation(text_of("node %u marked node %u, which is well: ", node.index, owner->index) + event.text);
      }
      return;
    }
    case What::kRenew:
      begin(node.index, static_cast<std::uint32_t>(event.number) + 1);
      return drain(node);
    case What::kMet:
    case What::kRenewed:
    case What::kPurged:
      node.seen[event.slot] = 0;
      return;
    default:
      return;
  }
}

bool Simulation::converged(std::string* why) const {
  const auto no = [&](const std::string& text) {
    if (why != nullptr) *why = text;
    return false;
  };
  std::size_t up = 0;
  for (const auto& node : nodes_) up += node->up && !node->leaving;
  for (const auto& reader : nodes_) {
    if (!reader->up || reader->leaving) continue;
    if (reader->core->alive() != up - 1)
      return no(text_of("node %u shows %zu of %zu others", reader->index, reader->core->alive(), up - 1));
    for (const auto& owner : nodes_) {
      if (!owner->up || owner->leaving || owner == reader) continue;
      const gossip::Member* member = reader->core->member(owner->id);
      if (member == nullptr || member->hidden || !(member->life == owner->core->life()) || member->replica.seq() != owner->seq)
        return no(text_of("node %u has node %u at %llu, not %llu", reader->index, owner->index,
                          static_cast<unsigned long long>(member ? member->replica.seq() : 0),
                          static_cast<unsigned long long>(owner->seq)));
      if (reader->entries->checksum(reader->core->slot_of(owner->id)) != owner->own->checksum(0))
        return no(text_of("node %u has another set of node %u", reader->index, owner->index));
      if (options_.whole_sets && reader->whole->set(reader->core->slot_of(owner->id)) != owner->own_whole->set(0))
        return no(text_of("node %u has a set of node %u with the same checksum", reader->index, owner->index));
    }
  }
  return true;
}

gossip::Counts Simulation::counts() const {
  gossip::Counts all;
  for (const auto& node : nodes_) {
    if (!node->core) continue;
#define X(name) all.name += node->core->counts.name;
    P2PKV_GOSSIP_COUNTS(X)
#undef X
  }
  return all;
}

double Simulation::known_after(std::uint32_t i) const {
  const Node& dead = *nodes_[i];
  for (const auto& node : nodes_) {
    const gossip::Member* member = node->up ? node->core->member(dead.id) : nullptr;
    if (member != nullptr && !member->hidden) return -1;
  }
  return dead.last_hidden - dead.crashed_at;
}

std::uint32_t Simulation::shown_by(std::uint32_t i) const {
  std::uint32_t count = 0;
  for (const auto& node : nodes_) {
    const gossip::Member* member = node->up && node->index != i ? node->core->member(nodes_[i]->id) : nullptr;
    count += member != nullptr && !member->hidden;
  }
  return count;
}

void Simulation::dump() const {
  for (const auto& node : nodes_) {
    std::printf("node %u %s epoch %u seq %llu\n", node->index, node->up ? "up" : "down", node->epoch,
                static_cast<unsigned long long>(node->seq));
    if (!node->up) continue;
    for (const std::uint32_t slot : node->core->slots()) {
      const gossip::Member& member = *node->core->member_at(slot);
      std::printf("  of node %u: epoch %u, state %u%s%s, seq %llu of %llu%s%s, heard %.3f s ago, repair in %.3f, %u nacks, %u wants\n",
                  by_id_.at(member.life.node), member.life.epoch, static_cast<unsigned>(member.state),
                  member.hidden ? ", hidden" : "", member.knows_us ? "" : ", does not know us",
                  static_cast<unsigned long long>(member.replica.seq()), static_cast<unsigned long long>(member.replica.said()),
                  member.replica.proven() ? ", proven" : "", member.replica.diverged() ? ", diverged" : "",
                  now_ - member.last_heard, member.repair_at - now_, member.nacks, member.wants);
    }
  }
}

std::vector<std::size_t> Simulation::alive_by_node() const {
  std::vector<std::size_t> out;
  for (const auto& node : nodes_) out.push_back(node->up ? node->core->alive() : 0);
  return out;
}

}  // namespace p2pkv::sim
