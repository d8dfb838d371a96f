// Python bindings of an engine's GETs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <chrono>
#include <deque>
#include <memory>

#include "buffer.hpp"
#include "copier.hpp"
#include "gets.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace p2pkv;

namespace {

// The directory of the arena, and its two files for as long.
struct Directory {
    Directory(nb::handle table_memory, nb::handle marks_memory, const Buffer& arena, bool unchecked = false)
        : table(table_memory, false),
          marks(marks_memory, true),
          reader(table.data(), table.size(), marks.data(), marks.size(), arena.data(), arena.size(), unchecked) {}
    Buffer table, marks;
    DirectoryReader reader;
};

// The same by itself. For tests.
struct HeldReader {
    HeldReader(nb::handle table, nb::handle marks, nb::handle arena_memory, bool unchecked)
        : arena(arena_memory, false), directory(table, marks, arena, unchecked) {}
    Buffer arena;
    Directory directory;
};

constexpr unsigned kCopiers = 2;  // one does not use up what the memory can give

// A socket's gets, and the arena that they are copied from, held for as long.
struct HeldGets {
    HeldGets(int fd, nb::handle arena, nb::object table, nb::object marks, double look_s)
        : main_thread(nb::cast<unsigned long>(nb::module_::import_("threading").attr("main_thread")().attr("ident"))),
          memory(arena, false),
          directory(table.is_none() ? nullptr : std::make_unique<Directory>(table, marks, memory)),
          copier(directory == nullptr ? nullptr : std::make_unique<Copier>(directory->reader, kCopiers)),
          gets(fd, memory.data(), memory.size(), directory == nullptr ? nullptr : &directory->reader,
               look_s < 0 ? Gets::looks_here() : look_s) {}
    const unsigned long main_thread;  // where Python handles signals: no other thread need ask, or take the GIL for that
    Buffer memory;
    std::unique_ptr<Directory> directory;
    std::unique_ptr<Copier> copier;  // with the directory
    Gets gets;
};

bool signalled() {
    nb::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

bool never() { return false; }

constexpr size_t kFewKeys = 64;  // of a get or load that is tried the shortest way; more are not in a hurry
constexpr Py_ssize_t kKeyBytesMin = 8, kKeyBytesMax = 64;  // p2pkv/types.py

double monotonic_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

nb::tuple as_tuple(const Gets::Result& result) {
    return nb::make_tuple(static_cast<int>(result.end),
                          nb::bytes(reinterpret_cast<const char*>(result.statuses.data()), result.statuses.size()),
                          nb::bytes(result.detail.data(), result.detail.size()));
}

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
    return as_tuple(result);
}

// A get of few keys whose arguments are what they should be: per key whether its block has come. None: they are not, or
// there is no agent any more, and nothing was done. What get() returns: it did not end well.
//
// All that such a get takes is in here: in between an engine computes, and what Python would touch is in no cache by then.
nb::object get_few(HeldGets& self, uint64_t space, nb::handle keys, nb::handle buffers, uint64_t block_bytes,
                   nb::handle deadline_ms) {
    if (!PyList_CheckExact(keys.ptr()) || !PyList_CheckExact(buffers.ptr()) || !PyLong_CheckExact(deadline_ms.ptr()))
        return nb::none();
    const auto count = static_cast<size_t>(PyList_GET_SIZE(keys.ptr()));
    if (count == 0 || count > kFewKeys || static_cast<size_t>(PyList_GET_SIZE(buffers.ptr())) != count) return nb::none();
    const long long patience_ms = PyLong_AsLongLong(deadline_ms.ptr());
    if (PyErr_Occurred() != nullptr) PyErr_Clear();  // and it is -1
    if (patience_ms < 0 || patience_ms > UINT32_MAX || !self.gets.lives()) return nb::none();
    std::array<nb::object, kFewKeys> held_keys;  // another thread may change the list meanwhile
    std::array<Py_buffer, kFewKeys> views;
    Gets::Ask ask;
    ask.space = space;
    ask.block_bytes = block_bytes;
    ask.deadline_ms = static_cast<uint64_t>(patience_ms);
    ask.deadline = monotonic_s() + static_cast<double>(patience_ms) / 1000;
    const auto take = [&](size_t i) {  // who gives a buffer may change the lists
        if (static_cast<size_t>(PyList_GET_SIZE(keys.ptr())) <= i || static_cast<size_t>(PyList_GET_SIZE(buffers.ptr())) <= i) return false;
        PyObject* key = PyList_GET_ITEM(keys.ptr(), static_cast<Py_ssize_t>(i));
        PyObject* buffer = PyList_GET_ITEM(buffers.ptr(), static_cast<Py_ssize_t>(i));
        if (!PyBytes_CheckExact(key)) return false;
        if (PyBytes_GET_SIZE(key) < kKeyBytesMin || PyBytes_GET_SIZE(key) > kKeyBytesMax) return false;
        if (PyObject_GetBuffer(buffer, &views[i], PyBUF_CONTIG) != 0) return false;
        if (static_cast<uint64_t>(views[i].len) != block_bytes) {
            PyBuffer_Release(&views[i]);
            return false;
        }
        held_keys[i] = nb::borrow(key);
        ask.keys.emplace_back(PyBytes_AS_STRING(key), static_cast<size_t>(PyBytes_GET_SIZE(key)));
        ask.buffers.push_back(static_cast<unsigned char*>(views[i].buf));
        return true;
    };
    size_t held = 0;
    while (held < count && take(held)) ++held;
    Gets::Result result;
    if (held == count) {
        const bool here = PyThread_get_thread_ident() == self.main_thread;
        nb::gil_scoped_release release;
        result = self.gets.get(ask, here ? signalled : never);
    } else {
        PyErr_Clear();
    }
    for (size_t i = 0; i < held; ++i) PyBuffer_Release(&views[i]);
    if (held != count) return nb::none();
    if (result.end == Gets::End::interrupted) throw nb::python_error();
    if (result.end != Gets::End::done) return as_tuple(result);
    nb::list out;
    for (const unsigned char status : result.statuses) out.append(status == 0);
    return out;
}

nb::bytes came_of(const Copier::Done& done) {
    return nb::bytes(reinterpret_cast<const char*>(done.came.data()), done.came.size());
}

// Loads into one region of what is in the arena, done before they return. All that one takes is in here, results and their
// numbers too: in between an engine computes, and what Python would touch is in no cache by then (8 of 50 us for 1 MiB).
struct LoadsHere {
    nb::object gets;    // a HeldGets
    nb::object memory;  // the region, mapped for as long
    uintptr_t base;
    uint64_t slot_bytes, slots;
    nb::object next, finished, result;  // numbers of jobs; what a result is given to; its type, a NamedTuple
    nb::object kind, source, no_error;  // "load", "local", ""
};

LoadsHere loads_here(nb::object gets, nb::object memory, uintptr_t base, uint64_t slot_bytes, uint64_t slots, nb::object next,
                     nb::object finished, nb::type_object result) {
    nb::cast<HeldGets&>(gets);
    return {gets, memory, base, slot_bytes, slots, next, finished, result, nb::str("load"), nb::str("local"), nb::str("")};
}

// A list of the same, so many times.
nb::object list_of(size_t count, PyObject* each) {
    nb::object list = nb::steal(PyList_New(static_cast<Py_ssize_t>(count)));
    if (!list.is_valid()) throw nb::python_error();
    for (size_t i = 0; i < count; ++i) PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), nb::borrow(each).release().ptr());
    return list;
}

// JobResult (p2pkv/client/jobs.py) of so many blocks that are all here.
nb::object result_of(const LoadsHere& self, nb::handle job, size_t count, uint64_t bytes) {
    static constexpr std::array<char, kFewKeys> kStatuses{};
    nb::object fields[] = {nb::borrow(job),
                           self.kind,
                           list_of(count, Py_True),
                           nb::bytes(kStatuses.data(), count),
                           list_of(count, self.source.ptr()),
                           nb::int_(bytes),
                           nb::int_(0),
                           nb::bool_(false),
                           self.no_error};
    auto* type = reinterpret_cast<PyTypeObject*>(self.result.ptr());
    nb::object result = nb::steal(type->tp_alloc(type, std::size(fields)));  // as a tuple's own __new__ does it
    if (!result.is_valid()) throw nb::python_error();
    for (size_t i = 0; i < std::size(fields); ++i)
        PyTuple_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), fields[i].release().ptr());
    return result;
}

// The job's number, if all blocks are in the arena and it was soon done. None: it was not so, or an argument is not as it
// should be; slots may have been written to.
nb::object load(LoadsHere& self, uint64_t space, uint64_t block_bytes, nb::handle keys, nb::handle slots) {
    HeldGets& gets = *nb::inst_ptr<HeldGets>(self.gets);
    if (gets.copier == nullptr || !PyList_CheckExact(keys.ptr()) || !PyList_CheckExact(slots.ptr())) return nb::none();
    const auto count = static_cast<size_t>(PyList_GET_SIZE(keys.ptr()));
    if (count == 0 || count > kFewKeys || static_cast<size_t>(PyList_GET_SIZE(slots.ptr())) != count) return nb::none();
    if (count * block_bytes > Copier::kNowBytes || block_bytes > self.slot_bytes) return nb::none();
    std::array<std::string_view, kFewKeys> names;
    std::array<unsigned char*, kFewKeys> to;
    std::array<nb::object, kFewKeys> held;  // another thread may change the lists meanwhile
    for (size_t i = 0; i < count; ++i) {
        PyObject* key = PyList_GET_ITEM(keys.ptr(), static_cast<Py_ssize_t>(i));
        const size_t slot = PyLong_AsSize_t(PyList_GET_ITEM(slots.ptr(), static_cast<Py_ssize_t>(i)));
        if (slot >= self.slots || !PyBytes_CheckExact(key)) {
            PyErr_Clear();
            return nb::none();
        }
        held[i] = nb::borrow(key);
        names[i] = {PyBytes_AS_STRING(key), static_cast<size_t>(PyBytes_GET_SIZE(key))};
        to[i] = reinterpret_cast<unsigned char*>(self.base) + slot * self.slot_bytes;
    }
    bool good;
    {
        nb::gil_scoped_release release;
        good = gets.gets.lives() && gets.copier->copy_now(space, names.data(), to.data(), count, block_bytes);
    }
    if (!good) return nb::none();
    const nb::object job = nb::steal(PyIter_Next(self.next.ptr()));
    if (!job.is_valid()) throw nb::python_error();
    self.finished(result_of(self, job, count, count * block_bytes));
    return job;
}

// Copy these blocks to these addresses, if all of them are in the arena. What came, or True: it goes on. None: they are not, or
// an argument is not as it should be, or copies have ended, or have no thread; nothing was done.
nb::object copy_here(HeldGets& self, uint64_t job, uint64_t space, nb::list keys, const std::vector<uintptr_t>& to,
                     uint64_t block_bytes) {
    const size_t count = nb::len(keys);
    if (self.copier == nullptr || count == 0 || to.size() != count) return nb::none();
    std::vector<Copier::Item> items(count);
    for (size_t i = 0; i < count; ++i) {
        PyObject* key = PyList_GET_ITEM(keys.ptr(), static_cast<Py_ssize_t>(i));
        if (!PyBytes_CheckExact(key)) return nb::none();
        items[i] = {std::string(PyBytes_AS_STRING(key), static_cast<size_t>(PyBytes_GET_SIZE(key))),
                    reinterpret_cast<unsigned char*>(to[i])};
    }
    Copier::Taken taken = Copier::Taken::no;
    Copier::Done done;
    {
        nb::gil_scoped_release release;  // no object may be touched in here, not even None
        bool here = self.gets.lives();
        for (size_t i = 0; here && i < count; ++i) here = self.directory->reader.has(space, items[i].key, block_bytes);
        if (here) taken = self.copier->submit(job, space, std::move(items), block_bytes, &done);
    }
    if (taken == Copier::Taken::no) return nb::none();
    return taken == Copier::Taken::done ? nb::object(came_of(done)) : nb::cast(true);
}

nb::list copied(HeldGets& self) {
    nb::list out;
    if (self.copier == nullptr) return out;
    for (const Copier::Done& done : self.copier->drain())
        out.append(nb::make_tuple(done.job, came_of(done)));
    return out;
}

}  // namespace

void bind_gets(nb::module_& m) {
    nb::class_<HeldReader>(m, "DirectoryReader")
        .def(nb::init<nb::handle, nb::handle, nb::handle, bool>(), "table"_a, "marks"_a, "arena"_a, "unchecked"_a = false)
        .def(
            "copy",
            [](const HeldReader& self, uint64_t space, nb::bytes key, nb::handle out) {
                const Buffer buffer(out, true);
                nb::gil_scoped_release release;
                return self.directory.reader.copy(space, {key.c_str(), key.size()},
                                                  static_cast<unsigned char*>(buffer.data()), buffer.size(), false);
            },
            "namespace"_a, "key"_a, "out"_a)
        .def(
            "copy_proven",
            [](const HeldReader& self, uint64_t space, nb::bytes key, nb::handle out) {
                const Buffer buffer(out, true);
                Digest digest;
                nb::gil_scoped_release release;
                return static_cast<int>(self.directory.reader.copy_proven(space, {key.c_str(), key.size()},
                                                                          static_cast<unsigned char*>(buffer.data()),
                                                                          buffer.size(), &digest));
            },
            "namespace"_a, "key"_a, "out"_a);
    nb::class_<HeldGets>(m, "Gets")
        .def(nb::init<int, nb::handle, nb::object, nb::object, double>(), "fd"_a, "arena"_a, "table"_a = nb::none(),
             "marks"_a = nb::none(), "look_s"_a = -1.0)
        .def("get", get, "namespace"_a, "keys"_a, "buffers"_a, "block_bytes"_a, "deadline_ms"_a, "deadline"_a)
        .def("copy_here", copy_here, "job"_a, "namespace"_a, "keys"_a, "to"_a, "block_bytes"_a)
        .def("copied", copied)
        .def_prop_ro("copied_fd", [](const HeldGets& self) { return self.copier == nullptr ? -1 : self.copier->fd(); })
        .def(
            "call_off_copies", [](HeldGets& self) { if (self.copier != nullptr) self.copier->call_off(); },
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "end_copies", [](HeldGets& self) { if (self.copier != nullptr) self.copier->end(); },
            nb::call_guard<nb::gil_scoped_release>())
        .def("wake_copied", [](HeldGets& self) { if (self.copier != nullptr) self.copier->wake(); })
        .def("get_few", get_few, "namespace"_a, "keys"_a, "buffers"_a, "block_bytes"_a, "deadline_ms"_a)
        .def("close", [](HeldGets& self, std::string reason) { self.gets.close(std::move(reason)); }, "reason"_a,
             nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("broken", [](const HeldGets& self) { return self.gets.broken(); });
    nb::class_<LoadsHere>(m, "LoadsHere")
        .def(nb::new_(&loads_here), "gets"_a, "memory"_a, "base"_a, "slot_bytes"_a, "slots"_a, "next"_a, "finished"_a, "result"_a)
        .def("__call__", load, "namespace"_a, "block_bytes"_a, "keys"_a, "slots"_a);
}
