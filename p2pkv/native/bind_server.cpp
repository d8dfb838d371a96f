// Python bindings of the server.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_server(nb::module_&) {}
