#include "events.hpp"

#include <algorithm>
#include <unordered_map>
#include <utility>

namespace p2pkv::store {

void EventQueue::add(uint64_t key, Tier tier) {
    waiting_.keys.push_back(key);
    waiting_.tiers.push_back(tier);
    if (waiting_.keys.size() > compact_at_) compact();
}

Events EventQueue::take() {
    compact_at_ = kCompactAt;
    return std::exchange(waiting_, {});
}

void EventQueue::compact() {
    struct Seen {
        Tier first;
        size_t last;
    };
    std::unordered_map<uint64_t, Seen> seen;
    seen.reserve(waiting_.keys.size());
    for (size_t i = 0; i < waiting_.keys.size(); ++i)
        seen.try_emplace(waiting_.keys[i], Seen{waiting_.tiers[i], i}).first->second.last = i;
    // One tier, so a key's events alternate: if first and last differ, the reader already believes the last.
    Events kept;
    for (size_t i = 0; i < waiting_.keys.size(); ++i) {
        const Seen& of = seen.find(waiting_.keys[i])->second;
        if (of.last != i || of.first != waiting_.tiers[i]) continue;
        kept.keys.push_back(waiting_.keys[i]);
        kept.tiers.push_back(waiting_.tiers[i]);
    }
    waiting_ = std::move(kept);
    compact_at_ = std::max(kCompactAt, 2 * waiting_.keys.size());
}

Changes last_words(const Events& events) {
    Changes out;
    const size_t count = events.keys.size();
    const auto say = [&](size_t i) { (events.tiers[i] == Tier::gone ? out.gone : out.dram).push_back(events.keys[i]); };
    if (count <= 16) {  // what a commit leaves: a block came, and another had to go for it
        for (size_t i = 0; i < count; ++i) {
            const auto rest = events.keys.begin() + static_cast<ptrdiff_t>(i) + 1;
            if (std::find(rest, events.keys.end(), events.keys[i]) == events.keys.end()) say(i);
        }
        return out;
    }
    std::unordered_map<uint64_t, size_t> last;
    last.reserve(count);
    for (size_t i = 0; i < count; ++i) last[events.keys[i]] = i;
    for (size_t i = 0; i < count; ++i)
        if (last.find(events.keys[i])->second == i) say(i);
    return out;
}

}  // namespace p2pkv::store
