// Python bindings of p2pkv._native. Memory is named by address where it is the arena's (its owner keeps it mapped for
// the life of the process) and by buffer where it is a caller's.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "buffer.hpp"
#include "io_engine.hpp"
#include "placement.hpp"
#include "workers.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace p2pkv;

void bind_store(nb::module_& m);
void bind_server(nb::module_& m);
void bind_lane(nb::module_& m);
void bind_gets(nb::module_& m);
void bind_inline(nb::module_& m);
void bind_msgpack(nb::module_& m);
void bind_mapping(nb::module_& m);
void bind_datagrams(nb::module_& m);

namespace {

nb::bytes to_bytes(const Digest& digest) { return nb::bytes(digest.data(), digest.size()); }

nb::bytes to_bytes(const std::vector<Digest>& digests) {
    return nb::bytes(reinterpret_cast<const char*>(digests.data()), digests.size() * sizeof(Digest));
}

nb::bytes to_bytes(const std::vector<unsigned char>& bytes) {
    return nb::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

nb::bytes xxh3_128(nb::handle data) {
    Buffer buffer(data, false);
    Digest digest;
    {
        nb::gil_scoped_release release;
        digest = hash_ops().oneshot(buffer.data(), buffer.size());
    }
    return to_bytes(digest);
}

bool copy(nb::handle dst, nb::handle src) {
    Buffer to(dst, true), from(src, false);
    if (to.size() != from.size()) throw nb::value_error("copy: source and destination differ in length");
    nb::gil_scoped_release release;
    return guarded_copy(to.data(), from.data(), to.size(), CopyDeadline::max());
}

nb::object copy_hash(nb::handle dst, nb::handle src) {
    Buffer to(dst, true), from(src, false);
    if (to.size() != from.size()) throw nb::value_error("copy_hash: source and destination differ in length");
    Digest digest;
    bool ok;
    {
        nb::gil_scoped_release release;
        ok = guarded_copy_hash(to.data(), from.data(), to.size(), CopyDeadline::max(), &digest);
    }
    return ok ? nb::object(to_bytes(digest)) : nb::none();
}

uintptr_t address_of(nb::handle object) {
    Buffer buffer(object, false);
    return reinterpret_cast<uintptr_t>(buffer.data());
}

// Make pages present and writable ahead of use. 0, or the errno of madvise.

using Item = std::tuple<uintptr_t, uintptr_t, size_t>;

std::vector<WorkItem> to_items(const std::vector<Item>& items) {
    std::vector<WorkItem> out;
    out.reserve(items.size());
    for (const auto& [dst, src, length] : items)
        out.push_back({reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), length});
    return out;
}

Work to_work(int work) {
    if (work < 0 || work > 2) throw nb::value_error("work is 0 (copy), 1 (copy and hash) or 2 (hash)");
    return static_cast<Work>(work);
}

Clock::duration to_duration(double seconds) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::clamp(seconds, 0.0, 86400.0)));
}

CopyDeadline to_deadline(double deadline_s) {
    return deadline_s < 0 ? CopyDeadline::max() : Clock::now() + to_duration(deadline_s);
}

nb::tuple run_now(int work, const std::vector<Item>& items, double deadline_s) {
    const CopyDeadline deadline = to_deadline(deadline_s);
    const Work what = to_work(work);
    const auto list = to_items(items);
    std::vector<unsigned char> ok(list.size());
    std::vector<Digest> digests(list.size());
    {
        nb::gil_scoped_release release;
        for (size_t i = 0; i < list.size(); ++i) ok[i] = run_item(what, list[i], deadline, &digests[i]) ? 1 : 0;
    }
    return nb::make_tuple(to_bytes(ok), to_bytes(digests));
}

Limits to_limits(double deadline_s, double first_byte_s, double stall_s) {
    return {Clock::now() + to_duration(deadline_s), to_duration(first_byte_s), to_duration(stall_s)};
}

bool submit_receive(IoEngine& engine, uint64_t job, int fd, nb::bytes request,
                    const std::vector<std::pair<uintptr_t, uint32_t>>& blocks, double deadline_s, double first_byte_s,
                    double stall_s, uint64_t partial_bytes) {
    std::vector<Destination> destinations;
    destinations.reserve(blocks.size());
    for (const auto& [address, length] : blocks) destinations.push_back({reinterpret_cast<unsigned char*>(address), length});
    return engine.submit(std::make_unique<Receive>(job, fd, to_limits(deadline_s, first_byte_s, stall_s),
                                                   std::string(request.c_str(), request.size()), std::move(destinations),
                                                   partial_bytes));
}

bool submit_send(IoEngine& engine, uint64_t job, int fd, nb::bytes header, int file, uintptr_t mapping,
                 const std::vector<std::pair<uint64_t, uint64_t>>& runs, double deadline_s, double stall_s) {
    std::vector<FileRun> list;
    list.reserve(runs.size());
    for (const auto& [offset, length] : runs) list.push_back({offset, length});
    return engine.submit(std::make_unique<Send>(job, fd, to_limits(deadline_s, stall_s, stall_s),
                                                std::string(header.c_str(), header.size()), file,
                                                reinterpret_cast<const unsigned char*>(mapping), std::move(list)));
}

// A checksum taken piece by piece, as the pieces arrive.
class Hasher {
  public:
    Hasher() { hash_ops().reset(&state_); }
    void update(uintptr_t address, size_t length) {
        nb::gil_scoped_release release;
        hash_ops().update(&state_, reinterpret_cast<const void*>(address), length);
    }
    nb::bytes digest() const { return to_bytes(hash_ops().digest(&state_)); }

  private:
    HashState state_;
};

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // what lives as long as the process is no leak, and nobody's business at its end
    m.attr("HASH_IMPLEMENTATION") = hash_ops().name;
    m.def("xxh3_128", xxh3_128, "data"_a);
    m.def("copy", copy, "dst"_a, "src"_a);
    m.def("copy_hash", copy_hash, "dst"_a, "src"_a);
    m.def("address_of", address_of, "buffer"_a);
    m.def("many_processors", many_processors);
    m.def("run_now", run_now, "work"_a, "items"_a, "deadline_s"_a = -1.0);

    bind_store(m);
    bind_server(m);
    bind_lane(m);
    bind_gets(m);
    bind_inline(m);
    bind_msgpack(m);
    bind_mapping(m);
    bind_datagrams(m);

    nb::class_<Hasher>(m, "Hasher")
        .def(nb::init<>())
        .def("update", &Hasher::update, "address"_a, "length"_a)
        .def("digest", &Hasher::digest);

    nb::class_<Workers>(m, "Workers")
        .def(nb::init<unsigned>(), "threads"_a)
        .def_prop_ro("fd", &Workers::fd)
        .def_prop_ro("queued", &Workers::queued)
        .def(
            "submit",
            [](Workers& self, uint64_t job, int work, const std::vector<Item>& items, double deadline_s) {
                self.submit(job, to_work(work), to_items(items), to_deadline(deadline_s));
            },
            "job"_a, "work"_a, "items"_a, "deadline_s"_a = -1.0)
        .def("drain",
             [](Workers& self) {
                 nb::list out;
                 for (auto& done : self.drain())
                     out.append(nb::make_tuple(done.job, to_bytes(done.ok), to_bytes(done.digests)));
                 return out;
             })
        .def("stop", &Workers::stop, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<IoEngine>(m, "IoEngine")
        .def(nb::init<size_t>(), "transfers_max"_a)
        .def_prop_ro("fd", &IoEngine::fd)
        .def_prop_ro("active", &IoEngine::active)
        .def("receive", submit_receive, "job"_a, "fd"_a, "request"_a, "blocks"_a, "deadline_s"_a, "first_byte_s"_a,
             "stall_s"_a, "partial_bytes"_a)
        .def("send", submit_send, "job"_a, "fd"_a, "header"_a, "file"_a, "mapping"_a, "runs"_a, "deadline_s"_a,
             "stall_s"_a)
        .def("cancel", &IoEngine::cancel, "job"_a)
        .def("drain",
             [](IoEngine& self) {
                 nb::list out;
                 for (auto& e : self.drain())
                     out.append(nb::make_tuple(e.job, e.final, static_cast<int>(e.code), e.first, to_bytes(e.statuses),
                                               to_bytes(e.digests), e.bytes, e.waited_s,
                                               nb::bytes(e.detail.data(), e.detail.size())));
                 return out;
             })
        .def("stop", &IoEngine::stop, nb::call_guard<nb::gil_scoped_release>());
}
