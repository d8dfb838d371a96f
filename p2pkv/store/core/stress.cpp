#include "stress.hpp"

#include <algorithm>
#include <thread>
#include <unordered_set>

namespace p2pkv::store {

namespace {

constexpr uint64_t kWriting = uint64_t{1} << 63;
constexpr uint64_t kKeys = 24;
constexpr size_t kParkedMax = 4;
constexpr double kTick = 0.001;  // seconds that pass with every event of any thread

// The arena as its users see it: who wrote each page last, and whether somebody is at it.
class Pages {
  public:
    explicit Pages(uint64_t bytes) : words_(bytes / kPageBytes) {}

    bool begin_write(const Block& block) {
        bool alone = true;
        each(block, [&](auto& word) { alone &= (word.exchange(block.generation | kWriting) & kWriting) == 0; });
        return alone;
    }
    void end_write(const Block& block) {
        each(block, [&](auto& word) { word = block.generation; });
    }
    bool written_by(const Place& place) {
        for (uint64_t page = place.offset / kPageBytes; page * kPageBytes < place.offset + place.length; ++page)
            if (words_[page] != place.generation) return false;
        return true;
    }

  private:
    template <class Do>
    void each(const Block& block, Do&& what) {
        for (uint64_t page = block.offset / kPageBytes; page * kPageBytes < block.offset + block.length; ++page)
            what(words_[page]);
    }
    std::vector<std::atomic<uint64_t>> words_;
};

struct Shared {
    Store& store;
    const std::vector<uint64_t>& spaces;
    Pages pages;
    std::atomic<uint64_t> clock{0};
};

// One thread: as a transport that receives blocks and serves them.
class Hand {
  public:
    Hand(Shared& shared, uint64_t id, uint64_t seed) : shared_(shared), store_(shared.store), id_(id), state_(seed) {}

    void run(uint64_t rounds) {
        for (uint64_t round = 0; round < rounds && report.problem.empty(); ++round) step();
        for (const BlockRef& block : parked_) shared_.pages.end_write(*block);
        store_.clear(id_);
        store_.release_holder(id_);
    }
    Stressed report;

  private:
    uint64_t draw(uint64_t below) { return mix64(state_++) % below; }
    double now() { return static_cast<double>(++shared_.clock) * kTick; }
    uint64_t space() { return shared_.spaces[draw(shared_.spaces.size())]; }
    std::string key() {
        std::string out(16, '\0');
        out[0] = static_cast<char>(draw(kKeys));
        return out;
    }

    void step() {
        const uint64_t dice = draw(100);
        if (dice < 55)
            put();
        else if (dice < 92)
            read();
        else if (dice < 96)
            store_.erase(space(), key());
        else if (dice < 98)
            store_.expire(now());
        else
            clear();
    }

    void put() {
        BlockRef block;
        if (store_.reserve(space(), key(), now(), &block) != Reserved::ok) {
            ++report.refused;
            return;
        }
        if (!shared_.pages.begin_write(*block)) report.problem = "two writers in one slot";
        if (draw(4) == 0) std::this_thread::yield();
        const uint64_t end = draw(20);
        if (end == 0 && parked_.size() < kParkedMax) {
            if (store_.park(*block, id_) != Ended::done) report.problem = "a reservation could not be parked";
            parked_.push_back(block);
            return;
        }
        shared_.pages.end_write(*block);
        if (end == 1) {
            store_.abort(block);
        } else if (store_.commit(block, Digest{}, now())) {
            ++report.puts;
        } else {
            report.problem = "a reservation could not be committed";
        }
    }

    void read() {
        std::vector<std::string> names;
        for (uint64_t n = 1 + draw(4); n != 0; --n) names.push_back(key());
        const std::vector<std::string_view> keys(names.begin(), names.end());
        const Pinned pinned = store_.pin(space(), keys, 0.05, now(), id_);
        if (pinned.lease == 0) return;
        bool same = all_there(pinned);
        if (draw(2) == 0) std::this_thread::yield();
        same = all_there(pinned) && same;
        if (!store_.release(pinned.lease, now(), id_)) return;  // it ran out: what was read does not count
        ++report.leases;
        if (!same) report.problem = "a slot changed under a lease";
    }

    bool all_there(const Pinned& pinned) {
        return std::all_of(pinned.places.begin(), pinned.places.end(),
                           [&](const Place& place) { return !place.hit || shared_.pages.written_by(place); });
    }

    void clear() {
        for (const BlockRef& block : parked_) shared_.pages.end_write(*block);
        if (store_.clear(id_) != parked_.size()) report.problem = "the quarantine has lost count";
        parked_.clear();
    }

    Shared& shared_;
    Store& store_;
    const uint64_t id_;
    uint64_t state_;
    std::vector<BlockRef> parked_;
};

std::string replay(const Events& events, const Store& store) {
    std::unordered_set<uint64_t> here;
    for (size_t i = 0; i < events.keys.size(); ++i) {
        const bool gone = events.tiers[i] == Tier::gone;
        if (gone ? here.erase(events.keys[i]) == 0 : !here.insert(events.keys[i]).second) return "an event said twice";
    }
    const auto keys = store.index_keys();
    for (const uint64_t key : keys)
        if (here.count(key) == 0) return "a block that no event told of";
    return keys.size() == here.size() ? std::string() : "a block that is gone, and no event said so";
}

}  // namespace

Stressed stress_for_tests(Store& store, const std::vector<uint64_t>& spaces, unsigned threads, uint64_t rounds,
                          uint64_t seed, bool hear) {
    Shared shared{store, spaces, Pages(store.stats().capacity_bytes)};
    std::vector<std::unique_ptr<Hand>> hands;
    std::vector<std::thread> running;
    std::atomic<unsigned> left{threads};
    for (unsigned i = 0; i < threads; ++i) {
        hands.push_back(std::make_unique<Hand>(shared, i + 1, mix64(seed) + (uint64_t{i} << 40)));
        running.emplace_back([&, hand = hands.back().get()] {
            hand->run(rounds);
            --left;
        });
    }
    Events events;
    const auto listen = [&] {
        const Events more = store.take_events();
        events.keys.insert(events.keys.end(), more.keys.begin(), more.keys.end());
        events.tiers.insert(events.tiers.end(), more.tiers.begin(), more.tiers.end());
    };
    while (hear && left != 0) {
        listen();
        std::this_thread::yield();
    }
    for (std::thread& thread : running) thread.join();
    if (hear) listen();
    Stressed out;
    for (const auto& hand : hands) {
        out.puts += hand->report.puts;
        out.leases += hand->report.leases;
        out.refused += hand->report.refused;
        if (out.problem.empty()) out.problem = hand->report.problem;
    }
    if (out.problem.empty()) out.problem = store.problem();
    if (out.problem.empty() && hear) out.problem = replay(events, store);
    return out;
}

}  // namespace p2pkv::store
