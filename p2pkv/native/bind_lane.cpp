// Python bindings of the lane.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_lane(nb::module_&) {}
