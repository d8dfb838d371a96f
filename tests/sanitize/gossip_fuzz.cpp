// libFuzzer target: the fuzzer's bytes are what members, strangers and twins say to a node's protocol core, and how much
// time passes in between. With -DMAIN it is a program that runs the files named, and mutations of them.
//
// What must hold: no rule of the language is broken (sanitizers), every frame that goes out fits, and nothing grows past
// its bound. Input: a sequence of (who, kind, length, bytes).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "gossip.hpp"
#include "sets.hpp"

namespace {

using namespace p2pkv;
using namespace p2pkv::gossip;

constexpr Life kOwn{1, 5, 11};
constexpr Life kLives[] = {{2, 1, 21}, {3, 1, 31}, {2, 2, 22}, {2, 1, 23}, {1, 5, 12}, {1, 9, 13}, {4, 1, 41}, {1, 5, 11}};
constexpr std::size_t kMessagesMax = 400;

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

void run(const std::uint8_t* data, std::size_t size) {
  Settings settings;
  settings.members_max = 4;
  settings.entries_per_owner_max = 1'000;
  sim::WholeSets entries(settings.members_max + 1), own(1);
  double now = 100;
  Gossip core(settings, kOwn, "10.0.0.1:1", entries, own, 1, now);
  core.set_card(now, 1, std::string(40, 'c'));
  core.on_seeds(now, 0, {"10.0.0.2:1", "10.0.0.3:1"});
  Hello hello;  // two of them are members to begin with
  hello.echo = kOwn.instance;
  hello.known = true;
  hello.card_number = 1;
  hello.card = "card";
  for (int i = 0; i < 2; ++i) {
    hello.address = i == 0 ? "10.0.0.2:1" : "10.0.0.3:1";
    core.on_frame(now, kLives[i], hello.address, encode(hello));
  }
  for (std::size_t at = 0, count = 0; at + 3 <= size && count < kMessagesMax; ++count) {
    const unsigned who = data[at] & 7U, kind = data[at] >> 3U & 3U;
    const std::size_t length = std::min<std::size_t>(data[at + 1] | data[at + 2] << 8U, size - at - 3);
    const auto payload = std::make_shared<const std::string>(reinterpret_cast<const char*>(data + at + 3), length);
    at += 3 + length;
    switch (kind) {
      case 0:
      case 1:
        core.on_frame(now, kLives[who], who % 2 == 0 ? "10.0.0.2:1" : "10.0.0.9:9", payload);
        break;
      case 2:
        core.on_letter(now, kLives[who], payload);
        break;
      default:
        now += who == 7 ? 30.0 : 0.05 * who;
        for (int i = 0; i < 4 && core.next_timer() <= now; ++i) core.on_timer(now);
    }
    for (const auto& frame : core.frames) require(frame.payload->size() <= kFrameBytesMax, "a frame is too long");
    core.frames.clear();
    core.letters.clear();
    core.events.clear();
    require(core.slots().size() <= settings.members_max, "more members than there is room for");
    require(core.contacts() <= 2 * settings.members_max + 64, "more contacts than there is room for");
    for (const std::uint32_t slot : core.slots()) {
      const Member& member = *core.member_at(slot);
      require(entries.count(slot) <= settings.entries_per_owner_max, "more entries than one may have");
      require(entries.hidden(slot) == member.hidden, "hidden in one place only");
      require(member.hidden == (member.state != State::kAlive), "shown, and not alive");
      require(member.hidden || member.replica.proven(), "shown, and not proven");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  run(data, size);
  return 0;
}

#ifdef MAIN
int main(int argc, char** argv) {
  Random random(1);
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1;
  for (int file = 2; file < argc; ++file) {
    std::ifstream in(argv[file], std::ios::binary);
    const std::string seed{std::istreambuf_iterator<char>(in), {}};
    for (int round = 0; round < rounds; ++round) {
      std::string text = seed;
      for (std::size_t n = round == 0 ? 0 : 1 + random.below(6); n > 0 && !text.empty(); --n) {
        const std::size_t at = random.below(text.size());
        switch (random.below(4)) {
          case 0: text[at] = static_cast<char>(random.bits()); break;
          case 1: text.erase(at, 1 + random.below(8)); break;
          case 2: text.insert(at, text.substr(random.below(text.size()), random.below(60))); break;
          default: text[at] = static_cast<char>(text[at] ^ (1 << random.below(8)));
        }
      }
      run(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
    }
  }
  return 0;
}
#endif
