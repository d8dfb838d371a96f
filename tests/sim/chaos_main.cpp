// chaos_main FIRST COUNT: that many seeds of small cells under chaos; ends with 1, and says why, if any rule was broken.
#include <cstdio>
#include <cstdlib>

#include "simulation.hpp"

using namespace p2pkv;

int main(int argc, char** argv) {
  const std::uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const std::uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::uint64_t checks = 0;
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    sim::Options options = sim::small_chaos(seed);
    sim::Simulation cell(options);
    const std::string broken = sim::run_chaos(cell);
    checks += cell.results.checks;
    if (broken.empty()) continue;
    std::fprintf(stderr, "seed %llu: %s\n", static_cast<unsigned long long>(seed), broken.c_str());
    return 1;
  }
  std::printf("%llu seeds, %llu checks, nothing broken\n", static_cast<unsigned long long>(count),
              static_cast<unsigned long long>(checks));
  return 0;
}
