// Everything that can go wrong in a small cell, at random; and the silence after it, in which all must come right.
#include "node.hpp"
#include "simulation.hpp"

namespace p2pkv::sim {

/// What a life said, in its order, said again to one node over some seconds: as by somebody who has recorded it.
/// Only what the node had, or had in an earlier life: frames that are held back and let through later are merely late.
void Simulation::replay_something() {
  if (recorded_.empty()) return;
  const Life life = flights_[recorded_[random_.below(recorded_.size())]].from;
  const auto to = static_cast<std::uint32_t>(random_.below(options_.nodes));
  double at = now_ + latency();
  for (const std::uint32_t flight : recorded_) {
    if (!(flights_[flight].from == life)) continue;
    const auto had = nodes_[to]->had.find(life);
    if (had != nodes_[to]->had.end() && !had->second.contains(flights_[flight].counter)) continue;
    ++flights_[flight].uses;
    push(at, to, Kind::kFrame, flight);
    at += random_.within(0.001, 0.4);
  }
}

void Simulation::chaos(std::uint32_t steps) {
  const std::uint32_t n = options_.nodes;
  for (std::uint32_t step = 0; step < steps && !failed(); ++step) {
    const auto i = static_cast<std::uint32_t>(random_.below(n));
    const auto j = static_cast<std::uint32_t>(random_.below(n));
    switch (random_.below(24)) {
      case 0:
        crash(i);
        push(now_ + random_.within(0.01, 12.0), i, Kind::kStart, nodes_[i]->generation);
        break;
      case 1:
        if (nodes_[i]->up && !nodes_[i]->leaving) {
          leave(i);
          run(0.3);
          crash(i);
          push(now_ + random_.within(0.01, 5.0), i, Kind::kStart, nodes_[i]->generation);
        }
        break;
      case 2:
        stall(i, random_.within(0.1, 6.0));
        break;
      case 3:
        if (nodes_[i]->up && nodes_[i]->epoch >= 1 && random_.unit() < 0.5) restore(i);
        break;
      case 4:
        if (i != j) cut(i, j, true);
        break;
      case 5:
        if (i != j) {
          cut(i, j, true);
          cut(j, i, true);
        }
        break;
      case 6:
      case 7:
        heal();
        break;
      case 8:
      case 9:
        replay_something();
        break;
      case 10:  // bytes that mean nothing, sealed by a member
        if (nodes_[i]->up && i != j) {
          std::string bytes(1 + random_.below(80), '\0');
          for (char& byte : bytes) byte = static_cast<char>(random_.bits());
          bytes[0] = static_cast<char>(random_.below(24));
          if (bytes[0] == static_cast<char>(gossip::Type::kLeave)) bytes += "x";
          const std::uint32_t id = fly(std::make_shared<const std::string>(std::move(bytes)), *nodes_[i], random_.unit() < 0.3);
          flights_[id].counter = nodes_[i]->counter.take();
          nodes_[i]->last_counter = flights_[id].counter;
          push(now_ + latency(), j, Kind::kFrame, id);
        }
        break;
      case 11:  // a burst, more than a few deltas
        write(i, static_cast<std::uint32_t>(random_.below(4'000)), true);
        break;
      default:
        write(i, static_cast<std::uint32_t>(1 + random_.below(20)), true);
    }
    constexpr double kWaits[] = {0.001, 0.02, 0.1, 0.3};
    run(kWaits[random_.below(4)]);
  }
}

void Simulation::quiet() {
  calm_ = true;
  heal();
  options_.loss = std::min(options_.loss, 0.1);
  options_.lies = options_.corrupt = options_.doubled = 0;
  for (std::uint32_t i = 0; i < options_.nodes; ++i) {
    if (nodes_[i]->leaving) crash(i);
    nodes_[i]->stalled_until = std::min(nodes_[i]->stalled_until, now_);
    if (nodes_[i]->up)
      push(now_, i, Kind::kResume, nodes_[i]->generation);
    else
      start(i);
  }
}

Options small_chaos(std::uint64_t seed) {
  gossip::Random random(seed);
  Options options;
  options.seed = seed;
  options.nodes = static_cast<std::uint32_t>(2 + random.below(6));
  constexpr double kLosses[] = {0, 0.01, 0.1, 0.3};
  options.loss = kLosses[random.below(4)];
  options.doubled = random.unit() < 0.5 ? 0.05 : 0;
  options.corrupt = random.unit() < 0.5 ? 0.02 : 0;
  options.lies = random.unit() < 0.5 ? 0.3 : 0.05;
  constexpr double kLatencies[] = {0.0002, 0.002, 0.02};
  options.latency_s = kLatencies[random.below(3)];
  options.late = 0.05;
  options.recorded = 300;
  options.seeds = static_cast<std::uint32_t>(1 + random.below(2));
  options.settings.members_max = 16;
  options.settings.purge_s = random.unit() < 0.5 ? 8.0 : 60.0;
  return options;
}

std::string run_chaos(Simulation& cell) {
  for (std::uint32_t i = 0; i < cell.options().nodes; ++i) cell.start(i);
  cell.run(2.0);
  cell.chaos(120);
  cell.quiet();
  // Longer than silence, its pardon, the longest wait between two HELLOs, and what follows a stale epoch.
  constexpr double kQuietS = 40.0;
  std::string why;
  for (double waited = 0; waited < kQuietS && !cell.failed(); waited += 1.0) {
    cell.run(1.0);
    why.clear();
    if (cell.converged(&why)) break;
  }
  if (cell.failed()) return cell.results.violations.front();
  return why.empty() ? why : "not right after the silence: " + why;
}

}  // namespace p2pkv::sim
