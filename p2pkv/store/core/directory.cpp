#include "directory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <system_error>

#define XXH_INLINE_ALL
#include "xxhash.h"

namespace p2pkv {

directory::Hash directory::hash_of(uint64_t seed, uint64_t space, const void* key, size_t key_bytes) {
    const XXH128_hash_t hash = XXH3_128bits_withSeed(key, key_bytes, seed ^ space);
    return {hash.low64, hash.high64, static_cast<uint32_t>(hash.low64 >> 32) | 1};
}

namespace store {
namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;

char* map(int fd, size_t bytes) {
    if (ftruncate(fd, static_cast<off_t>(bytes)) != 0) throw std::system_error(errno, std::generic_category());
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) throw std::system_error(errno, std::generic_category());
    return static_cast<char*>(at);
}

// Twice as many ways as entries: with two buckets to choose from, both are full for one name in millions.
uint64_t buckets_for(uint64_t entries) { return std::bit_ceil(2 * entries / directory::kWays + 1); }

}  // namespace

Directory::Directory(int table_fd, int marks_fd, uint64_t arena_bytes, uint64_t entries, uint64_t seed)
    : buckets_(buckets_for(entries)), entries_(entries), seed_(seed) {
    table_ = map(table_fd, directory::table_bytes(buckets_, entries_));
    try {
        marks_ = map(marks_fd, directory::marks_bytes(entries_));
    } catch (...) {
        munmap(table_, directory::table_bytes(buckets_, entries_));  // no destructor runs
        throw;
    }
    auto* header = reinterpret_cast<directory::Header*>(table_);
    *header = {directory::kMagic, directory::kVersion, sizeof(directory::Entry), buckets_, entries_, seed_, arena_bytes};
}

Directory::~Directory() {
    if (table_ != nullptr) munmap(table_, directory::table_bytes(buckets_, entries_));
    if (marks_ != nullptr) munmap(marks_, directory::marks_bytes(entries_));
}

directory::Bucket& Directory::bucket(uint64_t hash) const {
    return reinterpret_cast<directory::Bucket*>(table_ + directory::buckets_at())[hash & (buckets_ - 1)];
}

directory::Entry& Directory::entry(uint32_t number) const {
    return reinterpret_cast<directory::Entry*>(table_ + directory::entries_at(buckets_))[number];
}

directory::Way* Directory::free_way(directory::Bucket& bucket, size_t* taken) const {
    directory::Way* free = nullptr;
    *taken = 0;
    for (directory::Way& way : bucket.ways) {
        if (way.load(kRelaxed) != 0) {
            ++*taken;
        } else if (free == nullptr) {
            free = &way;
        }
    }
    return free;
}

uint32_t Directory::add(uint64_t space, std::string_view key, uint64_t offset, uint32_t length, const Digest& checksum) {
    const directory::Hash hash = directory::hash_of(seed_, space, key.data(), key.size());
    size_t in_first, in_second;
    directory::Way* first = free_way(bucket(hash.first), &in_first);
    directory::Way* second = free_way(bucket(hash.second), &in_second);
    directory::Way* way = second == nullptr || (first != nullptr && in_first <= in_second) ? first : second;
    if (way == nullptr) return kNowhere;
    uint32_t number;
    if (!free_.empty()) {
        number = free_.back();
        free_.pop_back();
    } else if (fresh_ < entries_) {
        number = fresh_++;
        entry(number).version.store(1, kRelaxed);
    } else {
        return kNowhere;
    }
    directory::Entry& at = entry(number);  // its version is odd
    uint64_t words[directory::kKeyBytes / 8] = {};
    std::memcpy(words, key.data(), key.size());
    at.space.store(space, kRelaxed);
    at.offset.store(offset, kRelaxed);
    at.length.store(length, kRelaxed);
    at.key_bytes.store(static_cast<uint32_t>(key.size()), kRelaxed);
    for (size_t i = 0; i < directory::kKeyBytes / 8; ++i) at.key[i].store(words[i], kRelaxed);
    uint64_t sum[2];
    static_assert(sizeof sum == sizeof checksum);
    std::memcpy(sum, checksum.data(), sizeof sum);
    for (size_t i = 0; i < 2; ++i) at.checksum[i].store(sum[i], kRelaxed);
    take_mark(number);
    at.version.store(at.version.load(kRelaxed) + 1, std::memory_order_release);
    way->store(uint64_t{hash.tag} << 32 | (number + 1), std::memory_order_release);
    return number;
}

void Directory::remove(uint32_t number, uint64_t space, std::string_view key) {
    directory::Entry& at = entry(number);
    at.version.store(at.version.load(kRelaxed) + 1, kRelaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // before anything is written to the slot, by whomever
    const directory::Hash hash = directory::hash_of(seed_, space, key.data(), key.size());
    const uint64_t way = uint64_t{hash.tag} << 32 | (number + 1);
    for (const uint64_t which : {hash.first, hash.second})
        for (directory::Way& each : bucket(which).ways)
            if (each.load(kRelaxed) == way) each.store(0, kRelaxed);
    free_.push_back(number);
}

bool Directory::take_mark(uint32_t number) {
    auto* mark = reinterpret_cast<std::atomic<unsigned char>*>(marks_ + directory::marks_at() + number);
    return mark->load(kRelaxed) != 0 && mark->exchange(0, kRelaxed) != 0;
}

}  // namespace store
}  // namespace p2pkv
