// Random keys in and out of the table of positions, and of a map, for a sanitizer to look at: the table grows and shrinks
// through every width of its groups, lines overflow, and in the end all memory is back.
//
// Arguments: seed, steps (ignored), "alone". Ends with 0, or says what differed and aborts.
#include "key_table.hpp"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <unordered_map>
#include <vector>

namespace {

using namespace p2pkv::index;

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "differs: %s\n", what);
  std::abort();
}

class Both {
 public:
  explicit Both(unsigned seed) : random_(seed), table_(pages_, random_()), first_bytes_(table_.bytes()) {}

  void add() {
    table_.reserve(1);
    const Position position = place();
    const Key key = random_();
    pages_[page_of(position)].keys[place_of(position)] = key;
    table_.insert(key, position);
    keys_.push_back(key);
    where_[key] = position;
  }

  void remove() {
    const std::size_t i = random_() % keys_.size();
    const Key key = keys_[i];
    keys_[i] = keys_.back();
    keys_.pop_back();
    const Position position = where_.extract(key).mapped();
    table_.reserve(1);
    table_.erase(key, position);
    free_.push_back(position);
  }

  void move() {
    const Key key = keys_[random_() % keys_.size()];
    const Position from = where_[key], to = place();
    pages_[page_of(to)].keys[place_of(to)] = key;
    table_.move(key, from, to);
    where_[key] = to;
    free_.push_back(from);
  }

  void compare() {
    check(table_.keys() == keys_.size(), "the number of keys");
    for (const auto& [key, position] : where_) check(table_.find(key) == position, "where a key is");
    for (int i = 0; i < 1'000; ++i) check(table_.find(random_()) == kNowhere, "a key that is not there");
  }

  void grow(std::size_t to) {
    while (keys_.size() < to) {
      add();
      if (random_() % 4 == 0) remove();
      if (random_() % 8 == 0 && !keys_.empty()) move();
    }
  }

  void shrink(std::size_t to) {
    while (keys_.size() > to) {
      remove();
      if (random_() % 4 == 0) add();
    }
    table_.shrink();
  }

  double bytes_per_key() const { return static_cast<double>(table_.bytes()) / static_cast<double>(keys_.size()); }
  void all_back() const { check(table_.bytes() == first_bytes_, "memory when nothing is left"); }

 private:
  Position place() {
    if (free_.empty()) {
      pages_.reserve(1);
      const PageId page = pages_.take();
      for (unsigned i = 0; i < kPageKeys; ++i) free_.push_back(make_position(page, i));
    }
    const Position position = free_.back();
    free_.pop_back();
    return position;
  }

  std::mt19937_64 random_;
  Pages pages_;
  KeyTable table_;
  const std::size_t first_bytes_;
  std::unordered_map<Key, Position> where_;
  std::vector<Key> keys_;
  std::vector<Position> free_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  Both both(static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10)));
  for (const std::size_t most : {3'000UL, 100'000UL, 9'000UL, 60'000UL}) {
    // Compared at sizes that are not those of the table's steps.
    for (std::size_t size = 50; size < most; size = size * 5 / 4 + 7) {
      both.grow(size);
      both.compare();
    }
    check(both.bytes_per_key() < 9.5, "the table is full enough");
    for (std::size_t size = most; size > 100; size = size * 3 / 4) {
      both.shrink(size);
      both.compare();
    }
  }
  both.shrink(0);
  both.all_back();
}
