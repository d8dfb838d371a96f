// A chain, run by run: which keys lie side by side, and where. For readers and writers of the index.
#pragma once

#include <algorithm>

#include "key_table.hpp"
#include "keys.hpp"
#include "pages.hpp"

namespace p2pkv::index {

/// Keys of a chain from number `from` on. `page` is kNoPage for one key that nobody holds.
struct Run {
  std::uint32_t from = 0;
  std::uint32_t count = 0;
  PageId page = kNoPage;
  unsigned place = 0;

  bool found() const { return page != kNoPage; }
  Mask mask() const { return ones(place, count); }
};

class Walk {
 public:
  Walk(const Pages& pages, const KeyTable& table, const Keys& keys, std::size_t from = 0)
      : pages_(pages), table_(table), keys_(keys), at_(from) {}

  /// The next run, which ends before key number `end`. False: that is where we are.
  bool next(Run& run, std::size_t end) {
    if (at_ >= end) return false;
    const Position position = find();
    run.from = static_cast<std::uint32_t>(at_);
    guess_ = kNoPage;
    if (position == kNowhere) {
      run.count = 1;
      run.page = kNoPage;
      if (++at_ + kAhead < keys_.size()) table_.prefetch(keys_[at_ + kAhead]);
      return true;
    }
    run.page = page_of(position);
    run.place = place_of(position);
    const Page& page = pages_[run.page];
    const auto live = static_cast<unsigned>(std::countr_one(page.live >> run.place));
    const auto most = static_cast<unsigned>(std::min<std::size_t>(std::max(live, 1U), end - at_));
    run.count = 1 + keys_.same_run(at_ + 1, page.keys + run.place + 1, most - 1);
    at_ += run.count;
    if (run.place + run.count == kPageKeys && run.page + 1 < pages_.top()) guess_ = run.page + 1;
    // Where the run after the next one is likely to begin.
    if (at_ + kPageKeys < keys_.size()) table_.prefetch(keys_[at_ + kPageKeys]);
    return true;
  }

  /// Go on from key number `at`.
  void skip_to(std::size_t at) { at_ = at; }

 private:
  static constexpr std::size_t kAhead = 16;  // keys that nobody holds: about one memory latency of look-ups

  Position find() const {
    if (guess_ != kNoPage) {  // chains that came in one piece lie in neighbouring pages
      const Page& page = pages_[guess_];
      if ((page.live & 1U) != 0 && page.keys[0] == keys_[at_]) return make_position(guess_, 0);
    }
    return table_.find(keys_[at_]);
  }

  const Pages& pages_;
  const KeyTable& table_;
  const Keys& keys_;
  std::size_t at_;
  PageId guess_ = kNoPage;
};

}  // namespace p2pkv::index
