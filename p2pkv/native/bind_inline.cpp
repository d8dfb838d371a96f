// Python bindings of the NIXL process's fast path.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "inline_reads.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace p2pkv;

void bind_inline(nb::module_& m) {
    nb::class_<InlineReads>(m, "InlineReads")
        .def(
            "__init__",
            [](InlineReads* self, int fd, int bell, nb::object descriptors, nb::object create, nb::object post, nb::object release,
               uintptr_t base, uint64_t arena_bytes) {
                new (self) InlineReads(fd, bell, {descriptors, create, post, release}, base, arena_bytes);
            },
            "fd"_a, "bell"_a, "descriptors"_a, "create"_a, "post"_a, "release"_a, "base"_a, "arena_bytes"_a)
        .def_prop_ro("reads", &InlineReads::reads)
        .def_prop_ro("bytes_read", &InlineReads::bytes_read)
        .def("add_peer", &InlineReads::add_peer, "name"_a, "base"_a, "arena_bytes"_a)
        .def("remove_peer", &InlineReads::remove_peer, "name"_a)
        .def("serve", &InlineReads::serve, "seconds"_a, "other_fd"_a, "other_full"_a, "pieces"_a)
        .def("send", [](InlineReads& self, nb::bytes frame) { self.send(std::string(frame.c_str(), frame.size())); },
             "frame"_a);
}
