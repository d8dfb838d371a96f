// Python's view of the simulator. Types and meaning are documented in p2pkv/gossip/_gossip.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "../core/bindings.hpp"
#include "simulation.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using p2pkv::sim::Options;
using p2pkv::sim::Simulation;

namespace {

using Free = nb::call_guard<nb::gil_scoped_release>;

nb::dict results_of(const Simulation& cell) {
  const auto& results = cell.results;
  nb::dict out;
  out["events"] = results.events;
  out["frames"] = results.frames;
  out["frame_bytes"] = results.frame_bytes;
  out["letters"] = results.letters;
  out["letter_bytes"] = results.letter_bytes;
  out["useful_bytes"] = results.useful_bytes;
  out["lost"] = results.lost;
  out["checks"] = results.checks;
  out["marks"] = results.marks;
  out["false_marks"] = results.false_marks;
  out["refused_replays"] = results.refused_replays;
  out["overflowed"] = results.overflowed;
  out["pair_seconds"] = results.pair_seconds;
  out["violations"] = results.violations;
  return out;
}

}  // namespace

void bind_simulation(nb::module_& m) {
  nb::class_<Simulation>(m, "Simulation")
      .def("__init__",
           [](Simulation* self, std::uint32_t nodes, std::uint64_t seed, double loss, double doubled, double corrupt,
              double latency_s, double late, double bits_per_s, double changes_per_s, std::uint32_t seeds,
              bool whole_sets, bool windows, std::uint32_t socket_frames, const nb::dict& settings) {
             Options options;
             options.nodes = nodes;
             options.seed = seed;
             options.loss = loss;
             options.doubled = doubled;
             options.corrupt = corrupt;
             options.latency_s = latency_s;
             options.late = late;
             options.bits_per_s = bits_per_s;
             options.changes_per_s = changes_per_s;
             options.seeds = seeds;
             options.whole_sets = whole_sets;
             options.windows = windows;
             options.socket_frames = socket_frames;
             options.settings = gossip_settings(settings);
             new (self) Simulation(options);
           },
           "nodes"_a, "seed"_a, nb::kw_only(), "loss"_a = 0.0, "doubled"_a = 0.0, "corrupt"_a = 0.0,
           "latency_s"_a = 0.0005, "late"_a = 0.01, "bits_per_s"_a = 10e9, "changes_per_s"_a = 0.0, "seeds"_a = 3,
           "whole_sets"_a = false, "windows"_a = false, "socket_frames"_a = 4'096, "settings"_a = nb::dict())
      .def("run", &Simulation::run, "seconds"_a, Free())
      .def("start", &Simulation::start, "node"_a, Free())
      .def("restore", &Simulation::restore, "node"_a, Free())
      .def("crash", &Simulation::crash, "node"_a, Free())
      .def("leave", &Simulation::leave, "node"_a, Free())
      .def("stall", &Simulation::stall, "node"_a, "seconds"_a, Free())
      .def("cut", &Simulation::cut, "source"_a, "to"_a, "is_cut"_a = true)
      .def("heal", &Simulation::heal, Free())
      .def("write", &Simulation::write, "node"_a, "changes"_a, "removals"_a = true, Free())
      .def("set_changes_per_s", &Simulation::set_changes_per_s, "rate"_a)
      .def("measure", &Simulation::measure, "on"_a)
      .def("up", &Simulation::up, "node"_a)
      .def("known_after", &Simulation::known_after, "node"_a, Free())
      .def("shown_by", &Simulation::shown_by, "node"_a, Free())
      .def("converged",
           [](const Simulation& self) {
             std::string why;
             return nb::make_tuple(self.converged(&why), why);
           })
      .def_prop_ro("now", &Simulation::now)
      .def_prop_ro("trace", &Simulation::digest)
      .def_prop_ro("counts", [](const Simulation& self) { return gossip_counts(self.counts()); })
      .def_prop_ro("results", results_of)
      .def_prop_ro("visible_ms", [](const Simulation& self) { return self.results.visible_ms; })
      .def_prop_ro("alive_by_node", &Simulation::alive_by_node);

  m.def(
      "chaos",
      [](std::uint64_t seed) {
        std::string broken;
        std::uint64_t checks, trace;
        {
          nb::gil_scoped_release free;
          Simulation cell(p2pkv::sim::small_chaos(seed));
          broken = p2pkv::sim::run_chaos(cell);
          checks = cell.results.checks;
          trace = cell.digest();
        }
        return nb::make_tuple(broken, checks, trace);
      },
      "seed"_a);
}
