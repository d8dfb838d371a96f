// The directory as an engine reads it: a block that is in the arena is copied out without asking anybody.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "../store/core/directory_layout.hpp"
#include "hash.hpp"

namespace p2pkv {

class DirectoryReader {
  public:
    // Mappings of the two files, and of the arena; they stay the caller's and have to outlive this. Whatever is in them,
    // nothing outside of them is read. `unchecked`, for tests: without the look afterwards.
    // Throws std::invalid_argument: it is none, or of another version.
    DirectoryReader(const void* table, size_t table_bytes, void* marks, size_t marks_bytes, const void* arena,
                    size_t arena_bytes, bool unchecked = false);

    // Copy the block to `out`, which has room for `length` bytes. False: it is not here, has another length, or its slot
    // was given to another while it was copied; `out` may have been written to. Thread-safe.
    // `away`: past the caches (copy.hpp). `count`: as a use of the block, and as a local hit.
    bool copy(uint64_t space, std::string_view key, unsigned char* out, uint64_t length, bool away, bool count = true) const;
    // Likewise, and checksum what was copied. `wrong`: the entry was there all along, and these are not its block's bytes.
    // Counts as a use of the block, but not as a local hit.
    enum class Proof { good, gone, wrong };
    Proof copy_proven(uint64_t space, std::string_view key, unsigned char* out, uint64_t length, Digest* digest) const;
    // Whether it is here now.
    bool has(uint64_t space, std::string_view key, uint64_t length) const;

  private:
    struct Found {
        const directory::Entry* entry;
        uint64_t version, offset;
    };
    bool find(uint64_t space, std::string_view key, uint64_t length, Found* out) const;
    const directory::Bucket& bucket(uint64_t hash) const { return buckets_[hash & (header_.buckets - 1)]; }
    bool is(const directory::Entry& entry, uint64_t space, std::string_view key) const;

    directory::Header header_;
    const directory::Bucket* buckets_;
    const directory::Entry* entries_;
    directory::Counts* counts_;
    std::atomic<unsigned char>* marks_;
    const unsigned char* arena_;
    const bool unchecked_;
};

}  // namespace p2pkv
