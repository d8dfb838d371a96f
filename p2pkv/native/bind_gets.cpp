// Python bindings of an engine's GETs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <deque>
#include <memory>

#include "buffer.hpp"
#include "gets.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace p2pkv;

namespace {

// A socket's gets, and the arena that they are copied from, held for as long.
struct HeldGets {
    HeldGets(int fd, nb::handle arena)
        : main_thread(nb::cast<unsigned long>(nb::module_::import_("threading").attr("main_thread")().attr("ident"))),
          memory(arena, false),
          gets(fd, memory.data(), memory.size()) {}
    const unsigned long main_thread;  // where Python handles signals: no other thread need ask, or take the GIL for that
    Buffer memory;
    Gets gets;
};

bool signalled() {
    nb::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

bool never() { return false; }

nb::tuple get(HeldGets& self, uint64_t space, nb::sequence keys, nb::sequence buffers, uint64_t block_bytes, uint64_t deadline_ms,
              double deadline) {
    Gets::Ask ask;
    ask.space = space;
    ask.block_bytes = block_bytes;
    ask.deadline_ms = deadline_ms;
    ask.deadline = deadline;
    std::vector<nb::bytes> held_keys;
    std::deque<Buffer> held_buffers;
    for (nb::handle key : keys) held_keys.push_back(nb::bytes(key));
    for (const nb::bytes& key : held_keys) ask.keys.emplace_back(key.c_str(), key.size());
    for (nb::handle buffer : buffers) {
        const Buffer& held = held_buffers.emplace_back(buffer, true);
        if (held.size() != block_bytes) throw nb::value_error("get: a buffer is not as long as a block");
        ask.buffers.push_back(static_cast<unsigned char*>(held.data()));
    }
    if (ask.keys.size() != ask.buffers.size()) throw nb::value_error("get: as many keys as buffers are needed");
    Gets::Result result;
    {
        const bool here = PyThread_get_thread_ident() == self.main_thread;
        nb::gil_scoped_release release;
        result = self.gets.get(ask, here ? signalled : never);
    }
    if (result.end == Gets::End::interrupted) throw nb::python_error();
    return nb::make_tuple(static_cast<int>(result.end),
                          nb::bytes(reinterpret_cast<const char*>(result.statuses.data()), result.statuses.size()),
                          nb::bytes(result.detail.data(), result.detail.size()));
}

}  // namespace

void bind_gets(nb::module_& m) {
    nb::class_<HeldGets>(m, "Gets")
        .def(nb::init<int, nb::handle>(), "fd"_a, "arena"_a)
        .def("get", get, "namespace"_a, "keys"_a, "buffers"_a, "block_bytes"_a, "deadline_ms"_a, "deadline"_a)
        .def("close", [](HeldGets& self, std::string reason) { self.gets.close(std::move(reason)); }, "reason"_a,
             nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("broken", [](const HeldGets& self) { return self.gets.broken(); });
}
