// Python bindings of the server.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "server.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace p2pkv;

namespace {

template <auto Counter>
uint64_t read_counter(const Server& server) {
    return (server.counters().*Counter).load(std::memory_order_relaxed);
}

}  // namespace

void bind_server(nb::module_& m) {
    nb::class_<Server>(m, "Server")
        .def(
            "__init__",
            [](Server* self, store::Store& store, int arena_fd, uintptr_t arena_base_address, double lease_ttl_s,
               size_t connections_max, double bytes_per_s) {
                new (self) Server(&store, arena_fd, reinterpret_cast<const unsigned char*>(arena_base_address),
                                  lease_ttl_s, connections_max, bytes_per_s);
            },
            "store"_a, "arena_fd"_a, "arena_base_address"_a, "lease_ttl_s"_a, "connections_max"_a, "bytes_per_s"_a = 0.0,
            nb::keep_alive<1, 2>())
        .def_prop_ro("fd", &Server::fd)
        .def_prop_ro("active", &Server::active)
        .def_prop_ro("bytes_served", read_counter<&ServerCounters::bytes_served>)
        .def_prop_ro("blocks_served", read_counter<&ServerCounters::blocks_served>)
        .def_prop_ro("gets", read_counter<&ServerCounters::gets>)
        .def_prop_ro("pins", read_counter<&ServerCounters::pins>)
        .def_prop_ro("refused", read_counter<&ServerCounters::refused>)
        .def_prop_ro("protocol_errors", read_counter<&ServerCounters::protocol_errors>)
        .def_prop_ro("cut_off", read_counter<&ServerCounters::cut_off>)
        .def_prop_ro("connections_refused", read_counter<&ServerCounters::connections_refused>)
        .def_prop_ro("leases_given", read_counter<&ServerCounters::leases_given>)
        .def_prop_ro("leases_held", read_counter<&ServerCounters::leases_held>)
        .def(
            "add",
            [](Server& self, int fd, uint64_t node, bool same_host, nb::bytes leftover) {
                return self.add(fd, node, same_host, std::string(leftover.c_str(), leftover.size()));
            },
            "fd"_a, "node"_a, "same_host"_a = false, "leftover"_a = nb::bytes(""))
        .def("drain",
             [](Server& self) {
                 nb::list out;
                 for (const ServerEvent& event : self.drain()) out.append(nb::make_tuple(event.node, event.text));
                 return out;
             })
        .def("may_send", &Server::may_send, "bytes"_a)
        .def("set_endpoint", &Server::set_endpoint, "name"_a)
        .def("stop", &Server::stop, nb::call_guard<nb::gil_scoped_release>());
}
