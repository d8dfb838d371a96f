// Several threads on one store at once, each looking after its own slots. For tests.
#pragma once
#include <string>
#include <vector>

#include "store.hpp"

namespace p2pkv::store {

struct Stressed {
    uint64_t puts = 0;
    uint64_t leases = 0;     // that were in force all along
    uint64_t refused = 0;    // reservations: there already, being written, or no space
    std::string problem;     // what went wrong first; empty: nothing
};

// Reserve, write, commit, abort, park, pin, read, release and delete at random, `rounds` times in each thread, in
// namespaces that are open. "Writing" leaves the generation in a word per page that the store knows nothing of, so two
// writers in one slot, or a writer under a lease, are seen. The books are checked at the end.
//
// `hear`: take the events all the while, and see at the end that they add up to what is there; for when nobody else uses
// the store. Otherwise they are left to the caller.
Stressed stress_for_tests(Store& store, const std::vector<uint64_t>& spaces, unsigned threads, uint64_t rounds,
                          uint64_t seed, bool hear);

}  // namespace p2pkv::store
