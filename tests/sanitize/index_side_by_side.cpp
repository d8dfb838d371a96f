// Random changes to the core of the prefix index and to maps, for a sanitizer to look at. With "threads", readers ask without
// a pause meanwhile, and look only at what must hold of any answer.
//
// Arguments: seed, steps, "threads" or "alone". Ends with 0, or says what differed and aborts.
#include "index_side_by_side.hpp"

#include <atomic>
#include <string>
#include <thread>

namespace {

using namespace side_by_side;

void ask(const PrefixIndex& index, const std::vector<Chain>& chains, const std::atomic<bool>& over, unsigned seed) {
  std::mt19937_64 random(seed);
  while (!over) {
    const Chain& chain = chains[random() % chains.size()];
    for (const Row& row : index.match(view(chain), (random() & 1U) != 0)) {
      std::uint32_t sum = 0;
      for (const std::uint32_t blocks : row.by_tier) sum += blocks;
      check(sum == row.depth && row.held >= row.depth && row.held <= chain.size(), "an answer beside a writer");
    }
    std::vector<unsigned char> any(chain.size());
    index.contains_any(view(chain), any.data());
    check(index.reach(view(chain)) <= chain.size(), "a reach beside a writer");
    check(index.holders(view(chain), 4, 3).size() > chain.size(), "holders beside a writer");
    std::vector<unsigned char> piece;
    index.dump_pages({1, 3, 4}, random() % 40, 2'000, piece);
    index.count(1);
    index.stats();
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const auto seed = static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10));
  const int steps = std::atoi(argv[2]);
  const bool threads = std::string(argv[3]) == "threads";
  SideBySide both(std::mt19937_64(seed), seed, !threads && seed % 3 == 0 ? kLimit : kNoLimit);
  std::atomic<bool> over{false};
  std::vector<std::thread> readers;
  for (unsigned i = 0; threads && i < 3; ++i)
    readers.emplace_back([&, i] { ask(both.index(), both.chains(), over, i); });
  for (int number = 0; number < steps; ++number) {
    both.step(number);
    if (number % 50 == 0) both.compare();
  }
  over = true;
  for (std::thread& reader : readers) reader.join();
  both.empty();
}
