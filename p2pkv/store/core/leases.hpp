// Leases: "these blocks stay where they are until released or T seconds pass". Pure bookkeeping; never looks into a
// block, and takes no pin off: whoever ends a lease gets its blocks and does that.
//
// 1. A lease is in force while now < expires_at; the owner counts from when it answers (the reader, on its own clock,
//    from before it asked, so the reader never believes in a lease that the owner has ended).
// 2. Every lease ends exactly once, by end, end_one_of or end_expired.
// 3. Leases, leases per holder and bytes per holder are bounded: `room` says what a holder may still pin.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "store_types.hpp"

namespace p2pkv::store {

using Blocks = std::vector<BlockRef>;

struct Lease {
    uint64_t id;
    uint64_t holder;
    Blocks blocks;  // one entry per pin
    uint64_t length;  // bytes of them
    double expires_at;
    size_t due = 0;           // its place in the heap
    Lease* before = nullptr;  // among its holder's, the oldest first
    Lease* after = nullptr;
};

class LeaseTable {
  public:
    explicit LeaseTable(const LeaseLimits& limits) : limits_(limits) {}

    size_t size() const { return leases_.size(); }
    bool has(uint64_t id) const { return leases_.count(id) != 0; }

    // How many bytes this holder may pin with one more lease; 0 when it may have no further lease.
    uint64_t room(uint64_t holder) const;

    // Enter a lease that `room` has room for, on blocks that the caller has pinned; `id` is not in use.
    const Lease& grant(uint64_t id, uint64_t holder, Blocks blocks, uint64_t length, double ttl_s, double now);

    // Null: there is none.
    const Lease* find(uint64_t id) const;
    const Lease* first_of(uint64_t holder) const;
    // The lease that was over first at `now`.
    const Lease* expired(double now) const;
    // Take a lease off the table; returns its blocks.
    Blocks end(const Lease& lease);

    template <class Visit>
    void each(Visit&& visit) const {
        for (const auto& [id, lease] : leases_) visit(lease);
    }
    // What is wrong with the books; empty when nothing is. For tests.
    std::string problem() const;

  private:
    struct Holder {  // exists only while it has a lease
        uint64_t leases = 0;
        uint64_t length = 0;
        Lease* first = nullptr;
        Lease* last = nullptr;
    };
    static bool sooner(const Lease& a, const Lease& b) {
        return a.expires_at != b.expires_at ? a.expires_at < b.expires_at : a.id < b.id;
    }
    void place(size_t at, Lease* lease);
    void sift_up(size_t at, Lease* lease);
    void sift_down(size_t at, Lease* lease);

    const LeaseLimits limits_;
    std::unordered_map<uint64_t, Lease> leases_;
    std::unordered_map<uint64_t, Holder> holders_;
    // A heap in which every lease knows its place: a released lease leaves at once, so the heap is never longer than the
    // table and nothing has to be swept.
    std::vector<Lease*> due_;
};

}  // namespace p2pkv::store
