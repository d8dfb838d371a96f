// Python bindings of memory: mappings as buffers, and their pages.
#include <nanobind/nanobind.h>

#include <cerrno>
#include <system_error>

#include "mapping.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace p2pkv;

namespace {

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
    const Mapping* mapping = nb::inst_ptr<Mapping>(self);
    return PyBuffer_FillInfo(view, self, mapping->data(), static_cast<Py_ssize_t>(mapping->size()),
                             mapping->writable() ? 0 : 1, flags);
}

PyType_Slot slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)}, {0, nullptr}};

}  // namespace

void bind_mapping(nb::module_& m) {
    nb::class_<Mapping>(m, "Mapping", nb::type_slots(slots))
        .def(
            "__init__",
            [](Mapping* self, int fd, size_t length, bool writable) {
                try {
                    new (self) Mapping(fd, length, writable);
                } catch (const std::system_error& error) {
                    errno = error.code().value();
                    PyErr_SetFromErrno(PyExc_OSError);
                    throw nb::python_error();
                }
            },
            "fd"_a, "length"_a, "writable"_a)
        .def_prop_ro("address", [](const Mapping& self) { return reinterpret_cast<uintptr_t>(self.data()); })
        .def("__len__", &Mapping::size);
    m.def("populate", populate, "address"_a, "length"_a, nb::call_guard<nb::gil_scoped_release>());
    m.def("collapse", collapse, "address"_a, "length"_a, nb::call_guard<nb::gil_scoped_release>());
}
