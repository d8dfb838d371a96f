#include "replica.hpp"

#include <algorithm>
#include <cstring>

#include "../../index/core/keys.hpp"

namespace p2pkv::gossip {

Hole Replica::hole(std::uint64_t known) const {
  std::uint64_t next = seq_ + 1;
  for (const auto& item : held_) {
    if (item.first > next) return {next, item.first - 1};
    next = item.first + 1;
  }
  return {next, std::max(known, said_seq_)};
}

Outcome Replica::hear(const Delta& delta, const Payload& holder, bool direct) {
  Outcome out;
  if (delta.seq < seq_) return out;
  if (delta.seq == seq_) {
    if (direct && !diverged_) {
      if (delta.seq >= said_seq_) {
        said_seq_ = delta.seq;
        said_checksum_ = delta.checksum;
      }
      compare(delta.checksum, out);
    }
    return out;
  }
  if (direct && delta.seq > said_seq_) {
    said_seq_ = delta.seq;
    said_checksum_ = delta.checksum;
    if (assembly_ && assembly_->missing == 0 && assembly_->seq <= said_seq_) {
      finish(out);
      if (delta.seq <= seq_) return out;
    }
  }
  if (delta.key_count() == 0) {
    if (!diverged_ && !held_.empty()) advance(out);  // what others repeated may reach the point just named
    return out;
  }
  if (direct && !diverged_ && delta.seq == seq_ + 1) {
    if (apply(delta, holder, out)) compare(delta.checksum, out);
    held_.erase(delta.seq);
    if (!held_.empty() && !diverged_) advance(out);
    return out;
  }
  auto [at, added] = held_.try_emplace(delta.seq, Held{holder, delta.body, direct});
  if (!added && direct) at->second = Held{holder, delta.body, true};
  while (held_.size() > kHeldMax) held_.erase(held_.begin());  // a snapshot will have the oldest
  if (!diverged_) advance(out);
  return out;
}

bool Replica::apply(const Delta& delta, const Payload& holder, Outcome& out) {
  for (std::uint32_t tier = 0; tier < kTiers; ++tier)
    if (const auto& group = delta.keys[tier]; group.count != 0 && !entries_.apply(slot_, group.data, group.count, tier))
      out.full = true;
  if (entries_.count(slot_) > entries_max_) out.refused = out.full = true;
  seq_ = delta.seq;
  proven_ = false;
  out.advanced = true;
  if (out.full) {
    diverged_ = out.diverged = true;
    return false;
  }
  if (tail_.size() == kTail) tail_.erase(tail_.begin());
  tail_.push_back({seq_, holder, delta.body});
  if (assembly_ && assembly_->seq <= seq_) assembly_.reset();  // overtaken by the deltas themselves
  return true;
}

void Replica::compare(std::uint64_t checksum, Outcome& out) {
  if (entries_.checksum(slot_) == checksum) {
    proven_ = out.proven = true;
  } else {
    diverged_ = out.diverged = true;
    proven_ = false;
  }
}

/// Rule 2: go on with what is held, as far as it reaches a point that the owner has named.
void Replica::advance(Outcome& out) {
  std::uint64_t next = seq_ + 1, until = 0;
  for (const auto& [seq, item] : held_) {
    if (seq != next++) break;
    if (item.direct || seq == said_seq_) until = seq;
  }
  while (seq_ < until && !diverged_) {
    auto item = held_.extract(held_.begin()).mapped();
    Delta delta;
    if (!decode_body(item.body, delta) || !apply(delta, item.holder, out)) break;
    if (seq_ == said_seq_)
      compare(said_checksum_, out);
    else if (item.direct)
      compare(delta.checksum, out);
  }
}

void Replica::drop_held() {
  while (!held_.empty() && held_.begin()->first <= seq_) held_.erase(held_.begin());
}

Outcome Replica::install(const Snapshot& part, const Payload& holder) {
  Outcome out;
  if (part.seq < seq_ || (part.seq == seq_ && proven())) return out;
  if (!assembly_ || assembly_->seq != part.seq || assembly_->checksum != part.checksum ||
      assembly_->there.size() != part.parts) {
    if (assembly_ && part.seq < assembly_->seq) return out;  // a straggler of an older one
    assembly_ = std::make_unique<Assembly>();
    assembly_->seq = part.seq;
    assembly_->checksum = part.checksum;
    assembly_->there.assign(part.parts, false);
    assembly_->missing = part.parts;
  }
  Assembly& made = *assembly_;
  if (made.there[part.part]) return out;
  made.there[part.part] = true;
  --made.missing;
  made.holders.push_back(holder);
  for (std::uint32_t tier = 1; tier < kTiers; ++tier) {
    const auto& group = part.keys[tier];
    if (group.count == 0) continue;
    made.groups.push_back({tier, group.data, group.count});
    made.keys += group.count;
    const index::Keys keys(group.data, group.count);
    for (std::size_t i = 0; i < group.count; ++i) made.sum ^= index::entry_checksum(keys[i], tier);
  }
  if (made.keys > entries_max_) {
    assembly_.reset();
    out.refused = true;
    return out;
  }
  if (made.missing != 0) return out;
  if (made.seq > said_seq_ && proven() && entries_.count(slot_) != 0) return out;  // what is shown stays until the owner speaks
  finish(out);
  return out;
}

/// A whole snapshot takes the view's place.
void Replica::finish(Outcome& out) {
  const auto whole = std::move(assembly_);
  if (whole->sum != whole->checksum || (whole->seq == said_seq_ && whole->checksum != said_checksum_)) {
    out.refused = true;
    return;
  }
  if (!entries_.replace(slot_, whole->groups)) {
    out.full = out.diverged = diverged_ = true;
    return;
  }
  seq_ = whole->seq;
  tail_.clear();
  out.advanced = true;
  diverged_ = out.diverged = entries_.checksum(slot_) != whole->checksum;  // the same key twice
  proven_ = out.proven = !diverged_ && seq_ == said_seq_;
  if (diverged_) return;
  drop_held();
  advance(out);
}

std::string_view Replica::tail(std::uint64_t seq) const {
  for (const auto& kept : tail_)
    if (kept.seq == seq) return kept.body;
  return {};
}

}  // namespace p2pkv::gossip
