// libFuzzer target: the fuzzer's bytes choose what is done to the core of the prefix index and to maps; all answers are compared.
#include "index_side_by_side.hpp"

namespace {

using namespace side_by_side;

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}
  bool over() const { return left_ == 0; }
  /// Two bytes; zeros once there are no more.
  std::size_t operator()() {
    std::size_t value = 0;
    for (int i = 0; i < 2 && left_ != 0; ++i, ++data_, --left_) value = value << 8U | *data_;
    return value;
  }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  SideBySide both(Bytes(data + 1, size - 1), data[0] & 7U, (data[0] & 8U) != 0 ? kLimit : kNoLimit);
  for (int number = 0; !both.source().over() && number < 1'000; ++number) {
    both.step(number);
    if (number % 16 == 15) both.compare();
  }
  both.compare();
  both.empty();
  return 0;
}
