#include "leases.hpp"

#include <utility>

namespace p2pkv::store {

uint64_t LeaseTable::room(uint64_t holder) const {
    if (leases_.size() >= limits_.leases_max) return 0;
    const auto found = holders_.find(holder);
    if (found == holders_.end()) return limits_.bytes_per_holder_max;
    const Holder& of = found->second;
    if (of.leases >= limits_.leases_per_holder_max || of.length >= limits_.bytes_per_holder_max) return 0;
    return limits_.bytes_per_holder_max - of.length;
}

const Lease& LeaseTable::grant(uint64_t id, uint64_t holder, Blocks blocks, uint64_t length, double ttl_s, double now) {
    if (ttl_s < limits_.ttl_min_s)
        ttl_s = limits_.ttl_min_s;
    else if (!(ttl_s <= limits_.ttl_max_s))  // NaN too
        ttl_s = limits_.ttl_max_s;
    Lease& lease = leases_.try_emplace(id, Lease{id, holder, std::move(blocks), length, now + ttl_s}).first->second;
    Holder& of = holders_[holder];
    ++of.leases;
    of.length += length;
    lease.before = of.last;
    (of.last == nullptr ? of.first : of.last->after) = &lease;
    of.last = &lease;
    due_.push_back(nullptr);
    sift_up(due_.size() - 1, &lease);
    return lease;
}

const Lease* LeaseTable::find(uint64_t id) const {
    const auto found = leases_.find(id);
    return found == leases_.end() ? nullptr : &found->second;
}

const Lease* LeaseTable::first_of(uint64_t holder) const {
    const auto found = holders_.find(holder);
    return found == holders_.end() ? nullptr : found->second.first;
}

const Lease* LeaseTable::expired(double now) const {
    return due_.empty() || due_.front()->expires_at > now ? nullptr : due_.front();
}

Blocks LeaseTable::end(const Lease& lease) {
    const auto holder = holders_.find(lease.holder);
    Holder& of = holder->second;
    (lease.before == nullptr ? of.first : lease.before->after) = lease.after;
    (lease.after == nullptr ? of.last : lease.after->before) = lease.before;
    of.length -= lease.length;
    if (--of.leases == 0) holders_.erase(holder);

    Lease* last = due_.back();
    due_.pop_back();
    if (last != &lease) {
        const size_t at = lease.due;
        sift_down(at, last);
        if (last->due == at) sift_up(at, last);
    }
    return std::move(leases_.extract(lease.id).mapped().blocks);
}

void LeaseTable::place(size_t at, Lease* lease) {
    due_[at] = lease;
    lease->due = at;
}

void LeaseTable::sift_up(size_t at, Lease* lease) {
    while (at != 0 && sooner(*lease, *due_[(at - 1) / 2])) {
        place(at, due_[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    place(at, lease);
}

void LeaseTable::sift_down(size_t at, Lease* lease) {
    for (size_t child = 2 * at + 1; child < due_.size(); child = 2 * at + 1) {
        if (child + 1 < due_.size() && sooner(*due_[child + 1], *due_[child])) ++child;
        if (!sooner(*due_[child], *lease)) break;
        place(at, due_[child]);
        at = child;
    }
    place(at, lease);
}

std::string LeaseTable::problem() const {
    if (due_.size() != leases_.size()) return "as many expiries as leases";
    for (size_t i = 0; i < due_.size(); ++i) {
        if (due_[i]->due != i) return "a lease does not know its place among the expiries";
        if (i != 0 && sooner(*due_[i], *due_[(i - 1) / 2])) return "a lease would expire too late";
        if (find(due_[i]->id) != due_[i]) return "an expiry of no lease";
    }
    uint64_t counted = 0;
    for (const auto& [id, of] : holders_) {
        uint64_t leases = 0, length = 0;
        for (const Lease* lease = of.first; lease != nullptr; lease = lease->after) {
            if (lease->holder != id) return "a lease in another holder's hands";
            if (lease->after == nullptr && lease != of.last) return "a holder's last lease is not its last";
            ++leases;
            length += lease->length;
        }
        if (leases == 0 || leases != of.leases || length != of.length) return "holders do not add up to the leases";
        counted += leases;
    }
    return counted == leases_.size() ? std::string() : "holders do not add up to the leases";
}

}  // namespace p2pkv::store
