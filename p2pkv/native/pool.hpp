// Idle data connections to peers, how long each peer may take to begin an answer, and who is not asked. Thread-safe.
#pragma once
#include <deque>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace p2pkv {

class Pool {
  public:
    struct Taken {
        int fd = -1;  // -1: there is none
        uint64_t node = 0;
        double first_byte_s = 0;
        bool near = false;  // it answers in less time than it takes to wake a thread or two
    };

    Pool(size_t per_node, double ceiling_s) : per_node_(per_node), ceiling_s_(ceiling_s) {}
    ~Pool() { clear(); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Keep a connection that nothing is under way on. `slot`: the node's place in the index, for take_slot (0: none); it
    // stays the node's for as long as the node has connections here. The oldest goes when there are too many.
    void give(uint64_t node, uint32_t slot, int fd, bool owes_release = false);
    // Tell the owner that we are done with its answer, on a connection that was given back owing that; whoever has taken
    // it meanwhile does so by the next request.
    void settle(uint64_t node, int fd);
    int take(uint64_t node);
    Taken take_slot(uint32_t slot);
    // Whose slot that is; 0 = nobody's with a connection here.
    uint64_t node_of(uint32_t slot);
    // Close what is kept for a node; what is in use at the moment comes back by give() and is closed by the next drop().
    void drop(uint64_t node);
    void clear();
    size_t idle();
    size_t idle_at(uint64_t node);

    // What is to be expected of a node: learnt by Python from all transfers (p2pkv/transport/estimates.py).
    void expect(uint64_t node, double first_byte_s, double byte_s);
    // Seconds until so many bytes of the slot's node are here; infinite where it has no idle connection.
    double cost(uint32_t slot, uint64_t bytes);

    // Whether waiting for it without sleeping is worth while.
    bool is_near(uint64_t node);
    // The node's first byte came after this long (see p2pkv/transport/patience.py for the estimate).
    void learn(uint64_t node, double waited_s);

    // Whether the node in this slot of the index is not to be asked: Python's circuit breakers say so.
    void shun(uint32_t slot, bool shunned);
    bool shunned(uint32_t slot);

  private:
    struct Idle {
        int fd;
        bool owes_release;
    };
    struct Peer {
        uint32_t slot = 0;
        double slowest_s = 0;
        double quickest_s = 0;  // of late; a large answer before it, or a busy owner, says nothing about how far the peer is
        double first_byte_s = 0, byte_s = 0;  // expected; 0: not known
        std::deque<Idle> idle;  // the warmest last
    };
    double first_byte_s(const Peer& peer) const;
    static bool near(const Peer& peer);
    int pop(Peer& peer);

    const size_t per_node_;
    const double ceiling_s_;
    std::mutex mutex_;
    std::unordered_map<uint64_t, Peer> peers_;
    std::unordered_map<uint32_t, uint64_t> node_of_slot_;
    std::unordered_set<uint32_t> shunned_;
};

}  // namespace p2pkv
