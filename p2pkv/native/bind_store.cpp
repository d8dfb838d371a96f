// Python bindings of the store. Types and meaning are documented in p2pkv/_native.pyi; p2pkv/store/dram.py is the layer
// that callers see. The mutex is held for microseconds, so calls keep the GIL unless they walk over all blocks: handing
// the GIL over and getting it back costs more than such a wait. No I/O thread ever waits for the GIL under the mutex.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <system_error>

#include "store.hpp"
#include "stress.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace p2pkv::store;

namespace {

std::string_view view(nb::handle bytes) {
    if (!PyBytes_CheckExact(bytes.ptr())) throw nb::type_error("a key is bytes");
    return {PyBytes_AS_STRING(bytes.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(bytes.ptr()))};
}

// Views of a sequence of bytes; the sequence is kept alive, and must not be changed, meanwhile.
class Keys {
  public:
    explicit Keys(nb::handle sequence)
        : items_(nb::steal(PySequence_Fast(sequence.ptr(), "keys are a sequence of bytes"))) {
        if (!items_.is_valid()) throw nb::python_error();
        const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(items_.ptr()));
        PyObject** items = PySequence_Fast_ITEMS(items_.ptr());
        views_.reserve(count);
        for (size_t i = 0; i < count; ++i) views_.push_back(view(items[i]));
    }
    const std::vector<std::string_view>& views() const { return views_; }

  private:
    nb::object items_;
    std::vector<std::string_view> views_;
};

nb::list to_list(const Blocks& blocks) {
    nb::list out = nb::steal<nb::list>(PyList_New(static_cast<Py_ssize_t>(blocks.size())));
    if (!out.is_valid()) throw nb::python_error();
    for (size_t i = 0; i < blocks.size(); ++i) {
        nb::object item = blocks[i] == nullptr ? nb::none() : nb::cast(blocks[i]);
        PyList_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), item.release().ptr());
    }
    return out;
}

template <class T>
nb::bytes pack(const std::vector<T>& items) {
    return nb::bytes(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T));
}

nb::bytes to_bytes(std::string_view bytes) { return nb::bytes(bytes.data(), bytes.size()); }

nb::tuple pin(Store& store, uint64_t space, nb::handle keys, double ttl_s, double now, uint64_t holder) {
    const PinnedBlocks got = store.pin_blocks(space, Keys(keys).views(), ttl_s, now, holder);
    return nb::make_tuple(got.lease, got.ttl_s, got.expires_at, to_list(got.blocks), got.considered);
}

nb::object reserve(Store& store, uint64_t space, nb::handle key, double now) {
    BlockRef block;
    const Reserved got = store.reserve(space, view(key), now, &block);
    return got == Reserved::ok ? nb::cast(std::move(block)) : nb::cast(static_cast<int>(got));
}

int commit(Store& store, Block& block, nb::handle checksum, double now) {
    Py_buffer buffer;
    if (PyObject_GetBuffer(checksum.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw nb::python_error();
    Digest digest;
    const bool fits = buffer.len == static_cast<Py_ssize_t>(digest.size());
    if (fits) std::memcpy(digest.data(), buffer.buf, digest.size());
    PyBuffer_Release(&buffer);
    if (!fits) throw nb::value_error("a checksum has 16 bytes");
    return static_cast<int>(store.commit(block, digest, now));
}

bool release(Store& store, uint64_t lease, double now, std::optional<uint64_t> holder) {
    return holder ? store.release(lease, now, *holder) : store.release_any(lease, now);
}

// What is most often there: nothing, or the block that was just committed.
nb::object take_changes(Store& store) {
    const Events events = store.take_events();
    if (events.keys.empty()) return nb::none();
    const Changes changes = last_words(events);
    return nb::make_tuple(pack(changes.gone), pack(changes.dram));
}

nb::tuple take_events(Store& store) {
    const Events events = store.take_events();
    return nb::make_tuple(pack(events.keys), pack(events.tiers));
}

nb::list to_list_of_bytes(const std::vector<std::string>& keys) {
    nb::list out;
    for (const std::string& key : keys) out.append(to_bytes(key));
    return out;
}

nb::list keys_of(const Store& store, uint64_t space, size_t limit) {
    std::vector<std::string> keys;
    {
        nb::gil_scoped_release unlocked;
        keys = store.keys(space, limit);
    }
    return to_list_of_bytes(keys);
}

nb::list hot(const Store& store, uint64_t space, size_t limit, nb::bytes after) {
    return to_list_of_bytes(store.hot(space, limit, {after.c_str(), after.size()}));
}

nb::bytes count_marks(Store& store, uint64_t space, nb::bytes from, size_t most, double now) {
    return to_bytes(store.count_marks(space, {from.c_str(), from.size()}, most, now));
}

nb::bytes index_keys(const Store& store) {
    std::vector<uint64_t> keys;
    {
        nb::gil_scoped_release unlocked;
        keys = store.index_keys();
    }
    return pack(keys);
}

nb::dict stats(const Store& store) {
    const Stats stats = store.stats();
    nb::dict out;
    out["capacity_bytes"] = stats.capacity_bytes;
    out["free_bytes"] = stats.free_bytes;
    out["live_bytes"] = stats.live_bytes;
    out["pinned_bytes"] = stats.pinned_bytes;
    out["quarantined_bytes"] = stats.quarantined_bytes;
    out["namespaces"] = stats.namespaces;
    out["blocks_live"] = stats.blocks_live;
    out["blocks_writing"] = stats.blocks_writing;
    out["blocks_unlisted"] = stats.blocks_unlisted;
    out["blocks_quarantined"] = stats.blocks_quarantined;
    out["leases"] = stats.leases;
    out["commits_total"] = stats.commits;
    out["aborts_total"] = stats.aborts;
    out["evictions_total"] = stats.evictions;
    out["extents_reclaimed_total"] = stats.extents_reclaimed;
    out["quarantines_total"] = stats.quarantines;
    out["leases_expired_total"] = stats.leases_expired;
    out["no_space_total"] = stats.no_space;
    return out;
}

void check_integrity(const Store& store) {
    std::string problem;
    {
        nb::gil_scoped_release unlocked;
        problem = store.problem();
    }
    if (!problem.empty()) {
        PyErr_SetString(PyExc_AssertionError, problem.c_str());
        throw nb::python_error();
    }
}

nb::dict stress(Store& store, const std::vector<uint64_t>& spaces, unsigned threads, uint64_t rounds, uint64_t seed,
               bool hear) {
    Stressed done;
    {
        nb::gil_scoped_release unlocked;
        done = stress_for_tests(store, spaces, threads, rounds, seed, hear);
    }
    nb::dict out;
    out["puts"] = done.puts;
    out["leases"] = done.leases;
    out["refused"] = done.refused;
    out["problem"] = nb::str(done.problem.c_str());
    return out;
}

void construct(Store* self, uint64_t capacity_bytes, uint64_t extent_bytes, bool evict, double ttl_min_s,
               double ttl_max_s, uint64_t leases_max, uint64_t leases_per_holder_max, uint64_t bytes_per_holder_max,
               uint64_t pinned_bytes_max, uint64_t quarantine_bytes_max, std::optional<uint64_t> lease_seed) {
    const LeaseLimits limits{ttl_min_s, ttl_max_s, leases_max, leases_per_holder_max, bytes_per_holder_max};
    new (self) Store(Options{capacity_bytes, extent_bytes, evict, limits, pinned_bytes_max, quarantine_bytes_max, lease_seed});
}

nb::object repr(const Block& block) {
    return nb::str("<Block {} of {:016x} at {}, {} bytes, generation {}, state {}, pins {}>")
        .attr("format")(to_bytes(block.key()).attr("hex")(), block.space_id, block.offset, block.length,
                        block.generation, static_cast<int>(block.state.load()), block.pins.load());
}

}  // namespace

void bind_store(nb::module_& m) {
    nb::class_<Block>(m, "Block")
        .def_prop_ro("namespace", [](const Block& block) { return block.space_id; })
        .def_prop_ro("key", [](const Block& block) { return to_bytes(block.key()); })
        .def_prop_ro("offset", [](const Block& block) { return block.offset; })
        .def_prop_ro("length", [](const Block& block) { return block.length; })
        .def_prop_ro("generation", [](const Block& block) { return block.generation; })
        .def_prop_ro("used_at", [](const Block& block) { return block.used_at.load(std::memory_order_relaxed); })
        .def_prop_ro("state", [](const Block& block) { return static_cast<int>(block.state.load()); })
        .def_prop_ro("pins", [](const Block& block) { return block.pins.load(std::memory_order_relaxed); })
        .def_prop_ro("checksum",
                     [](const Block& block) {
                         const bool proven = block.proven.load(std::memory_order_acquire);
                         return nb::bytes(block.checksum.data(), proven ? block.checksum.size() : 0);
                     })
        .def("__repr__", &repr);

    nb::class_<Store>(m, "Store")
        .def("__init__", &construct, nb::kw_only(), "capacity_bytes"_a, "extent_bytes"_a, "evict"_a, "ttl_min_s"_a,
             "ttl_max_s"_a, "leases_max"_a, "leases_per_holder_max"_a, "bytes_per_holder_max"_a, "pinned_bytes_max"_a,
             "quarantine_bytes_max"_a, "lease_seed"_a = nb::none())
        .def(
            "publish",
            [](Store& store, int table_fd, int marks_fd, uint64_t entries) {
                try {
                    store.publish(table_fd, marks_fd, entries);
                } catch (const std::system_error& error) {
                    errno = error.code().value();
                    PyErr_SetFromErrno(PyExc_OSError);
                    throw nb::python_error();
                }
            },
            "table_fd"_a, "marks_fd"_a, "entries"_a)
        .def("read_unasked",
             [](const Store& store) {
                 const Directory* directory = store.directory();
                 return directory == nullptr ? nb::make_tuple(0, 0)
                                             : nb::make_tuple(directory->blocks_read(), directory->bytes_read());
             })
        .def("open", &Store::open, "namespace"_a, "block_bytes"_a, "salt"_a, "slot_bytes"_a)
        .def("drop", &Store::drop, "namespace"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("pin", &pin, "namespace"_a, "keys"_a, "ttl_s"_a, "now"_a, "holder"_a)
        .def("release", &release, "lease_id"_a, "now"_a, "holder"_a = nb::none())
        .def("release_holder", &Store::release_holder, "holder"_a)
        .def("expire", &Store::expire, "now"_a)
        .def("reserve", &reserve, "namespace"_a, "key"_a, "now"_a)
        .def("commit", &commit, "block"_a, "checksum"_a, "now"_a)
        .def("abort", [](Store& store, Block& block) { return static_cast<int>(store.abort(block)); }, "block"_a)
        .def(
            "park",
            [](Store& store, Block& block, uint64_t token) { return static_cast<int>(store.park(block, token)); },
            "block"_a, "token"_a)
        .def("clear", &Store::clear, "token"_a)
        .def_prop_ro("quarantine_full", &Store::quarantine_full)
        .def(
            "lookup",
            [](const Store& store, uint64_t space, nb::handle key) -> nb::object {
                BlockRef block = store.lookup(space, view(key));
                return block == nullptr ? nb::none() : nb::cast(std::move(block));
            },
            "namespace"_a, "key"_a)
        .def(
            "lookup_many",
            [](const Store& store, uint64_t space, nb::handle keys) {
                return to_list(store.lookup_many(space, Keys(keys).views()));
            },
            "namespace"_a, "keys"_a)
        .def(
            "present",
            [](const Store& store, uint64_t space, nb::handle keys) {
                return pack(store.present(space, Keys(keys).views()));
            },
            "namespace"_a, "keys"_a)
        .def(
            "writing", [](const Store& store, uint64_t space, nb::handle key) { return store.writing(space, view(key)); },
            "namespace"_a, "key"_a)
        .def(
            "touch",
            [](Store& store, uint64_t space, nb::handle keys, double now) {
                return store.touch(space, Keys(keys).views(), now);
            },
            "namespace"_a, "keys"_a, "now"_a)
        .def(
            "delete", [](Store& store, uint64_t space, nb::handle key) { return store.erase(space, view(key)); },
            "namespace"_a, "key"_a)
        .def("count", &Store::count, "namespace"_a)
        .def("keys", &keys_of, "namespace"_a, "limit"_a)
        .def("hot", &hot, "namespace"_a, "limit"_a, "after"_a)
        .def("count_marks", &count_marks, "namespace"_a, "from_key"_a, "most"_a, "now"_a)
        .def("take_events", &take_events)
        .def("take_changes", &take_changes)
        .def("index_keys", &index_keys)
        .def("stats", &stats)
        .def_prop_ro("extents_waiting", &Store::extents_waiting)
        .def("take_extents",
             [](Store& store) {
                 nb::list out;
                 for (const auto& [offset, length] : store.take_extents()) out.append(nb::make_tuple(offset, length));
                 return out;
             })
        .def("check_integrity", &check_integrity)
        .def("ignore_leases_for_tests", &Store::ignore_leases_for_tests, "ignore"_a)
        .def("stress_for_tests", &stress, "namespaces"_a, "threads"_a, "rounds"_a, "seed"_a,
             "hear"_a = true);
}
