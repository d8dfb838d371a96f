// What the two halves of the extension share.
#pragma once

#include <nanobind/nanobind.h>

#include "gossip.hpp"

p2pkv::gossip::Settings gossip_settings(const nanobind::dict& given);
nanobind::dict gossip_counts(const p2pkv::gossip::Counts& counts);
void bind_simulation(nanobind::module_& m);
