// Python bindings of the engines' short way and of the pool of idle data connections.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "lane.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace p2pkv;

namespace {

nb::bytes to_bytes(const std::vector<unsigned char>& bytes) {
    return nb::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

nb::list drain(Lane& lane) {
    nb::list out;
    for (const LaneEvent& e : lane.drain()) {
        nb::list keys;
        for (const std::string& key : e.keys) keys.append(nb::bytes(key.data(), key.size()));
        nb::list rejected;
        for (const std::string& key : e.rejected_keys) rejected.append(nb::bytes(key.data(), key.size()));
        out.append(nb::make_tuple(static_cast<int>(e.kind), e.connection, e.request_id, e.space, keys,
                                  to_bytes(e.statuses), to_bytes(e.settled), e.asked_at, e.deadline, e.node,
                                  static_cast<int>(e.code), e.final, e.blocks, e.failed, e.rejected, e.missed, e.bytes, e.waited_s, e.took_s, rejected,
                                  nb::bytes(e.detail.data(), e.detail.size())));
    }
    return out;
}

Lane* make_lane(store::Store& store, IoEngine& receiver, Pool& pool, NixlReads* nixl, nb::capsule lookup, uintptr_t arena,
                double lease_ttl_s, double stall_s, uint64_t stream_bytes, uint32_t streams, uint64_t partial_bytes,
                uint64_t ahead_bytes, uint64_t one_sided_min, uint64_t neighbour_max, uint64_t spread_bytes, uint32_t in_flight_max) {
    if (std::string(lookup.name()) != index::kLookupCapsule) throw nb::type_error("lookup is not PrefixIndex.lookup");
    return new Lane(store, receiver, pool, nixl, *static_cast<const index::Lookup*>(lookup.data()),
                    {arena, lease_ttl_s, stall_s, stream_bytes, streams, partial_bytes, ahead_bytes, one_sided_min,
                     neighbour_max, spread_bytes, in_flight_max});
}

std::string text(nb::bytes bytes) { return std::string(bytes.c_str(), bytes.size()); }

}  // namespace

void bind_lane(nb::module_& m) {
    nb::class_<Pool>(m, "Pool")
        .def(nb::init<size_t, double>(), "per_node"_a, "ceiling_s"_a)
        .def("give", [](Pool& pool, uint64_t node, uint32_t slot, int fd) { pool.give(node, slot, fd); }, "node"_a,
             "slot"_a, "fd"_a)
        .def("take", &Pool::take, "node"_a)
        .def("drop", &Pool::drop, "node"_a)
        .def("expect", &Pool::expect, "node"_a, "first_byte_s"_a, "byte_s"_a)
        .def("learn", &Pool::learn, "node"_a, "waited_s"_a)
        .def("is_near", &Pool::is_near, "node"_a)
        .def("shun", &Pool::shun, "slot"_a, "shunned"_a)
        .def("shunned", &Pool::shunned, "slot"_a)
        .def("clear", &Pool::clear)
        .def("idle", &Pool::idle)
        .def("idle_at", &Pool::idle_at, "node"_a);

    nb::class_<Placement>(m, "Placement")
        .def(nb::init<>())
        .def("arrange", &Placement::arrange, "engine"_a, "reader"_a, "checker"_a)
        .def("give_up", &Placement::give_up);

    nb::class_<NixlReads>(m, "NixlReads")
        .def(nb::init<store::Store&, uintptr_t, uint64_t>(), "store"_a, "arena"_a, "partial_bytes"_a,
             nb::keep_alive<1, 2>())
        .def_prop_ro("fd", &NixlReads::fd)
        .def_prop_ro("reads", [](const NixlReads& self) { return self.reads.load(); })
        .def_prop_ro("bytes_read", [](const NixlReads& self) { return self.bytes_read.load(); })
        .def_prop_ro("bell", &NixlReads::bell)
        .def("attach", &NixlReads::attach, "fd"_a, "process"_a)
        .def("detach", &NixlReads::detach)
        .def("want", &NixlReads::want, "node"_a, "wanted"_a)
        .def("set_peer", &NixlReads::set_peer, "node"_a, "endpoint"_a)
        .def("drop_peer", &NixlReads::drop_peer, "node"_a)
        .def("reads_from", &NixlReads::reads_from, "node"_a)
        .def("drain",
             [](NixlReads& self) {
                 nb::list out;
                 for (const NixlReadsEvent& e : self.drain())
                     out.append(nb::make_tuple(static_cast<int>(e.kind), e.id, e.bytes));
                 return out;
             })
        .def("stop", &NixlReads::stop, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<Lane>(m, "Lane")
        .def(nb::new_(&make_lane), "store"_a, "receiver"_a, "pool"_a, "nixl"_a.none(), "lookup"_a, "arena"_a, "lease_ttl_s"_a, "stall_s"_a,
             "stream_bytes"_a, "streams"_a, "partial_bytes"_a, "ahead_bytes"_a,
             "one_sided_min"_a, "neighbour_max"_a, "spread_bytes"_a, "in_flight_max"_a, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>(),
             nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>())
        .def_prop_ro("fd", &Lane::fd)
        .def_prop_ro("in_flight", &Lane::in_flight)
        .def_prop_ro("blocks_in_flight", &Lane::blocks_in_flight)
        .def("drain", drain)
        .def("add", &Lane::add, "connection"_a, "fd"_a, "holder"_a)
        .def("allow", &Lane::allow, "connection"_a, "namespace"_a, "salt"_a)
        .def("send", [](Lane& lane, uint64_t id, nb::bytes frame) { return lane.send(id, text(frame)); },
             "connection"_a, "frame"_a)
        .def("close", &Lane::close, "connection"_a)
        .def("watch", [](Lane& lane, uint64_t space, nb::bytes key) { return lane.watch(space, text(key)); },
             "namespace"_a, "key"_a)
        .def("distrust",
             [](Lane& lane, uint64_t space, nb::bytes key, bool distrusted) { lane.distrust(space, text(key), distrusted); },
             "namespace"_a, "key"_a, "distrusted"_a)
        .def(
            "set_neighbour",
            [](Lane& lane, uint64_t node, int arena_fd, size_t arena_bytes, int table_fd, size_t table_bytes, int marks_fd,
               size_t marks_bytes) {
                lane.neighbours.set(node, std::make_shared<const Neighbour>(arena_fd, arena_bytes, table_fd, table_bytes,
                                                                            marks_fd, marks_bytes));
            },
            "node"_a, "arena_fd"_a, "arena_bytes"_a, "table_fd"_a, "table_bytes"_a, "marks_fd"_a, "marks_bytes"_a)
        .def("drop_neighbour", [](Lane& lane, uint64_t node) { lane.neighbours.remove(node); }, "node"_a)
        .def("set_draining", &Lane::set_draining, "draining"_a)
        .def("stop", &Lane::stop, nb::call_guard<nb::gil_scoped_release>())
        .def("counters", [](const Lane& lane) {
            nb::dict out;
            out["hits_local"] = lane.hits_local.load();
            out["bytes_local"] = lane.bytes_local.load();
            out["hits_peer"] = lane.hits_peer.load();
            out["bytes_peer"] = lane.bytes_peer.load();
            out["hits_neighbour"] = lane.hits_neighbour.load();
            out["misses"] = lane.misses.load();
            out["handed_over"] = lane.handed_over.load();
            return out;
        });
}
