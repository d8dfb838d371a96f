// What changes the index. Everything here runs with writer_ held.
#include <algorithm>
#include <string>

#include "prefix_index.hpp"

namespace p2pkv::index {
namespace {

// In which writers give way to readers: one to five microseconds each.
constexpr std::size_t kKeysPerSlice = 16;
// A page at a time: one that is half gone already would be emptied into another in the middle of its removal.
constexpr std::size_t kRemovedPerSlice = kPageKeys;
constexpr std::size_t kPagesPerSlice = 64;
// A closed page with at most so many keys is emptied into another one: at 576 bytes a page that bounds what a key costs.
constexpr int kSparse = 12;

std::uint64_t checksum_of(const Page& page, Mask mask, std::uint32_t tier) {
  const std::uint64_t salt = mix64(tier);
  std::uint64_t sum = 0;
  if (const int first = std::countr_zero(mask); mask != 0 && (mask >> first & ((mask >> first) + 1)) == 0) {
    const int end = first + std::countr_one(mask >> first);
    for (int i = first; i < end; ++i) sum ^= mix64(page.keys[i] ^ salt);
    return sum;
  }
  for (; mask != 0; mask &= mask - 1) sum ^= mix64(page.keys[std::countr_zero(mask)] ^ salt);
  return sum;
}

/// Without its ones from the one after the first `most` on.
Mask first_ones(Mask mask, std::size_t most) {
  Mask rest = mask;
  while (most-- != 0 && rest != 0) rest &= rest - 1;
  return mask & ~rest;
}

}  // namespace

std::size_t PrefixIndex::apply(std::int64_t node, const Keys& keys, std::int64_t tier) {
  const std::uint32_t slot = check_node(node);
  const std::uint32_t to = check_tier(tier, 0);
  check_length(keys);
  const std::lock_guard writing(writer_);
  return apply_locked(slot, keys, to);
}

std::size_t PrefixIndex::apply_locked(std::uint32_t node, const Keys& keys, std::uint32_t tier) {
  const std::size_t slice = tier == 0 ? kRemovedPerSlice : kKeysPerSlice;
  std::size_t changed = 0;
  for (std::size_t from = 0; from < keys.size();) {
    const std::size_t end = std::min(from + slice, keys.size());
    prepare(tier != 0);
    // One slice ahead: what this one needs is here by now, so that the lock is not held while memory is waited for.
    for (std::size_t i = from == 0 ? 0 : end; i < std::min(end + slice, keys.size()); ++i) table_.prefetch(keys[i]);
    const std::lock_guard lock(lock_);
    node_locked(node);
    Walk walk(pages_, table_, keys, from);
    Run run;
    while (walk.next(run, end)) {
      if (run.found()) {
        changed += tier == 0 ? take(node, run.page, run.mask()) : put(node, run.page, run.mask(), tier);
      } else if (tier != 0) {
        run = append(node, keys, run.from, end);
        changed += put(node, run.page, run.mask(), tier);
        walk.skip_to(run.from + run.count);
      }
    }
    from = end;
  }
  return changed;
}

/// Before the readers' lock is taken: memory for one slice. A slice that only removes can do without.
void PrefixIndex::prepare(bool adds) {
  try {
    pages_.reserve(3);  // two for what is appended, one to gather in
    table_.reserve(adds ? kKeysPerSlice : 1);
  } catch (const std::bad_alloc&) {
    if (adds) throw;
  }
}

PrefixIndex::Node& PrefixIndex::node_locked(std::uint32_t node) {
  if (node >= nodes_.size()) nodes_.resize(node + 1);
  return nodes_[node];
}

void PrefixIndex::make_room(Page& page, std::uint32_t more) {
  const std::size_t before = page.allocated();
  page.make_room(more);
  many_bytes_ += page.allocated() - before;
}

/// Puts new keys behind the node's latest ones, side by side: from number `from` on, up to one that is there already, `end`,
/// the end of the page, or the bound on entries.
Run PrefixIndex::append(std::uint32_t node, const Keys& keys, std::size_t from, std::size_t end) {
  if (postings_ >= max_entries_) throw_full();
  Node& state = nodes_[node];
  if (state.open == kNoPage) {
    state.open = pages_.take();
    pages_[state.open].opener = node + 1;
  }
  const PageId id = state.open;
  Page& page = pages_[id];
  const Run run{static_cast<std::uint32_t>(from), 0, id, page.used};
  try {
    make_room(page, 1);  // so that put() cannot fail any more
  } catch (const std::bad_alloc&) {
    if (page.used == 0) free(id);
    throw;
  }
  const std::size_t most = std::min({end - from, std::size_t{kPageKeys} - page.used, max_entries_ - postings_});
  std::uint32_t count = 0;
  do {
    const Key key = keys[from + count];
    const Position position = make_position(id, page.used++);
    page.keys[place_of(position)] = key;
    table_.insert(key, position);
    ++count;
  } while (count < most && table_.find(keys[from + count]) == kNowhere);
  page.live |= ones(run.place, count);
  if (page.used == kPageKeys) {
    page.opener = 0;
    state.open = kNoPage;
  }
  return {run.from, count, id, run.place};
}

/// The node has these places in `tier` now. Returns how many entries changed.
std::size_t PrefixIndex::put(std::uint32_t node, PageId id, Mask mask, std::uint32_t tier) {
  Page& page = pages_[id];
  make_room(page, 1);
  Node& state = nodes_[node];
  const Owner owner = make_owner(node, tier);
  Mask elsewhere = 0, here = 0;  // what it has already, in another tier and in this one
  const std::uint32_t first = page.find(make_owner(node, 0));
  for (std::uint32_t i = first; i < page.owners() && node_of(page.owner()[i]) == node; ++i)
    (page.owner()[i] == owner ? here : elsewhere) |= page.mask()[i] & mask;

  Mask gained = mask & ~(here | elsewhere);
  bool full = false;
  const std::size_t left = max_entries_ - postings_;
  if (static_cast<std::size_t>(std::popcount(gained)) > left) {
    const Mask refused = gained & ~first_ones(gained, left);
    const Mask before = (refused & (~refused + 1)) - 1;  // the places before the first one that is refused
    gained &= before;
    elsewhere &= before;
    full = true;
  }
  if (elsewhere != 0) {
    for (std::uint32_t i = first; i < page.owners() && node_of(page.owner()[i]) == node;) {
      const Mask old = page.mask()[i], moved = old & elsewhere;
      if (page.owner()[i] == owner || moved == 0) {
        ++i;
        continue;
      }
      state.checksum ^= checksum_of(page, moved, tier_of(page.owner()[i]));
      set(page, i, old & ~moved);
      if (old != moved) ++i;
    }
    make_room(page, 1);  // cannot fail: it may have moved into the page, where one entry has just become free
  }
  const Mask changed = gained | elsewhere;
  if (changed != 0) {
    page.add(owner, changed);
    state.checksum ^= checksum_of(page, changed, tier);
    state.count += static_cast<std::size_t>(std::popcount(gained));
    postings_ += static_cast<std::size_t>(std::popcount(gained));
  }
  if (full) throw_full();
  return static_cast<std::size_t>(std::popcount(changed));
}

/// The node no longer has these places, in whatever tier. Returns how many it had. Never fails.
std::size_t PrefixIndex::take(std::uint32_t node, PageId id, Mask mask) {
  Page& page = pages_[id];
  Node& state = nodes_[node];
  std::size_t taken = 0;
  for (std::uint32_t i = page.find(make_owner(node, 0)); i < page.owners() && node_of(page.owner()[i]) == node;) {
    const Mask old = page.mask()[i], hit = old & mask;
    if (hit != 0) {
      state.checksum ^= checksum_of(page, hit, tier_of(page.owner()[i]));
      taken += static_cast<std::size_t>(std::popcount(hit));
      set(page, i, old & ~hit);
    }
    if (hit != old) ++i;
  }
  state.count -= taken;
  postings_ -= taken;
  if (taken != 0) bury(id);
  return taken;
}

void PrefixIndex::set(Page& page, std::uint32_t i, Mask mask) {
  const std::size_t before = page.allocated();
  page.set(i, mask);
  many_bytes_ -= before - page.allocated();
}

/// Forgets the keys that nobody holds any more, and the page when it is not worth having.
void PrefixIndex::bury(PageId id) {
  Page& page = pages_[id];
  const Mask held = page.held();
  for (Mask dead = page.live & ~held; dead != 0; dead &= dead - 1) {
    const auto place = static_cast<unsigned>(std::countr_zero(dead));
    table_.erase(page.keys[place], make_position(id, place));
  }
  page.live = held;
  if (held == 0) {
    free(id);
  } else if (page.opener == 0 && id != gathering_ && std::popcount(held) <= kSparse) {
    gather(id);
  }
}

/// Moves what is left of a page to where other leftovers are. False: there is no memory for that now.
bool PrefixIndex::gather(PageId id) noexcept {
  Page& page = pages_[id];
  const auto needed = static_cast<unsigned>(std::popcount(page.live));
  try {
    if (gathering_ != kNoPage && pages_[gathering_].used + needed > kPageKeys) gathering_ = kNoPage;
    if (gathering_ == kNoPage) {
      pages_.reserve(1);
      gathering_ = pages_.take();
    }
    make_room(pages_[gathering_], page.owners());
  } catch (const std::bad_alloc&) {
    if (gathering_ != kNoPage && pages_[gathering_].used == 0) free(gathering_);
    return false;
  }
  Page& to = pages_[gathering_];
  unsigned place_in_to[kPageKeys];
  for (Mask left = page.live; left != 0; left &= left - 1) {
    const auto place = static_cast<unsigned>(std::countr_zero(left));
    const unsigned there = place_in_to[place] = to.used++;
    to.keys[there] = page.keys[place];
    table_.move(page.keys[place], make_position(id, place), make_position(gathering_, there));
    to.live |= ones(there, 1);
  }
  for (std::uint32_t i = 0; i < page.owners(); ++i) {
    Mask mask = 0;
    for (Mask left = page.mask()[i]; left != 0; left &= left - 1) mask |= ones(place_in_to[std::countr_zero(left)], 1);
    to.add(page.owner()[i], mask);
  }
  free(id);
  return true;
}

/// Nobody holds anything of the page any more, or it has been moved.
void PrefixIndex::free(PageId id) {
  Page& page = pages_[id];
  if (page.opener != 0) nodes_[page.opener - 1].open = kNoPage;
  if (id == gathering_) gathering_ = kNoPage;
  many_bytes_ -= page.allocated();
  page.clear();
  pages_.give(id);
}

/// Takes out of `node` every entry for which stale(key) holds. Looks at every page: a list of each node's pages would cost
/// every entry memory, and removals are rare; 100 M entries are 1.6 M pages.
template <typename Stale>
std::size_t PrefixIndex::sweep_locked(std::uint32_t node, Stale&& stale) {
  std::size_t removed = 0;
  for (PageId id = 0; id < pages_.top() && nodes_[node].count != 0;) {
    prepare(false);
    const std::lock_guard lock(lock_);
    const std::size_t before = removed;
    for (unsigned n = 0; n < kPagesPerSlice && removed - before < kRemovedPerSlice && id < pages_.top(); ++n, ++id) {
      if (!pages_.taken(id)) continue;
      const Page& page = pages_[id];
      Mask mask = 0;
      for (std::uint32_t i = page.find(make_owner(node, 0)); i < page.owners() && node_of(page.owner()[i]) == node; ++i)
        mask |= page.mask()[i];
      for (Mask left = mask; left != 0; left &= left - 1)
        if (const int place = std::countr_zero(left); !stale(page.keys[place])) mask &= ~ones(static_cast<unsigned>(place), 1);
      if (mask != 0) removed += take(node, id, mask);  // what is moved elsewhere because of that is not stale
    }
  }
  pages_.shrink();
  table_.shrink();
  return removed;
}

std::size_t PrefixIndex::replace(std::int64_t node, const std::vector<Group>& groups) {
  const std::uint32_t slot = check_node(node);
  std::vector<Key> wanted;
  for (const auto& [tier, keys] : groups) {
    check_tier(tier, 1);
    check_length(keys);
    for (std::size_t i = 0; i < keys.size(); ++i) wanted.push_back(keys[i]);
  }
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());

  const std::lock_guard writing(writer_);
  std::size_t changed = 0;
  // New entries first, then what is left over: a reader never sees the node without something it has before and after.
  for (const auto& [tier, keys] : groups) changed += apply_locked(slot, keys, static_cast<std::uint32_t>(tier));
  std::size_t count = 0;
  {
    const std::lock_guard lock(lock_);
    count = node_locked(slot).count;
  }
  if (count != wanted.size())
    changed += sweep_locked(slot, [&](Key key) { return !std::binary_search(wanted.begin(), wanted.end(), key); });
  return changed;
}

std::size_t PrefixIndex::remove_node(std::int64_t node) {
  const std::uint32_t slot = check_node(node);
  const std::lock_guard writing(writer_);
  {
    const std::lock_guard lock(lock_);
    if (slot >= nodes_.size()) return 0;
    nodes_[slot].hidden = true;  // gone for readers at once; its entries follow
  }
  const std::size_t removed = sweep_locked(slot, [](Key) { return true; });
  const std::lock_guard lock(lock_);
  if (const PageId open = nodes_[slot].open; open != kNoPage) {
    pages_[open].opener = 0;  // others hold what is in it
    bury(open);
  }
  nodes_[slot] = Node{};  // the slot may be given to another node now
  return removed;
}

void PrefixIndex::hide(std::int64_t node, bool hidden) {
  const std::uint32_t slot = check_node(node);
  const std::lock_guard writing(writer_);
  const std::lock_guard lock(lock_);
  node_locked(slot).hidden = hidden;
}

}  // namespace p2pkv::index
