// The directory as its owner keeps it (directory_layout.hpp says what it is). The store's mutex is held by every caller.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "directory_layout.hpp"
#include "store_types.hpp"

namespace p2pkv::store {

class Directory {
  public:
    static constexpr uint32_t kNowhere = ~uint32_t{0};

    // Two descriptors of files of nothing yet: they are given their size and mapped. They stay the caller's.
    // Throws std::system_error.
    Directory(int table_fd, int marks_fd, uint64_t arena_bytes, uint64_t entries, uint64_t seed);
    ~Directory();
    Directory(const Directory&) = delete;
    Directory& operator=(const Directory&) = delete;

    // A block is here, until it is removed. Its entry; kNowhere: there is no room, and engines ask for it as before.
    uint32_t add(uint64_t space, std::string_view key, uint64_t offset, uint32_t length, const Digest& checksum);
    // The block's slot is about to be another's: no engine believes the entry any more when this returns.
    void remove(uint32_t entry, uint64_t space, std::string_view key);
    // Whether an engine has used the block since this was last asked.
    bool take_mark(uint32_t entry);

    uint64_t blocks_read() const { return counts().blocks.load(std::memory_order_relaxed); }
    uint64_t bytes_read() const { return counts().bytes.load(std::memory_order_relaxed); }

  private:
    directory::Bucket& bucket(uint64_t hash) const;
    directory::Entry& entry(uint32_t number) const;
    directory::Counts& counts() const { return *reinterpret_cast<directory::Counts*>(marks_); }
    directory::Way* free_way(directory::Bucket& bucket, size_t* taken) const;

    const uint64_t buckets_, entries_, seed_;
    char* table_ = nullptr;
    char* marks_ = nullptr;
    std::vector<uint32_t> free_;  // entries that were used before
    uint32_t fresh_ = 0;          // the first that was not: entries are taken densely, so that few pages are touched
};

}  // namespace p2pkv::store
