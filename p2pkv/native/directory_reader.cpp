#include "directory_reader.hpp"

#include <bit>
#include <cstring>
#include <stdexcept>

#include "guard.hpp"

namespace p2pkv {
namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr uint64_t kEntriesMax = uint64_t{1} << 31;

}  // namespace

DirectoryReader::DirectoryReader(const void* table, size_t table_bytes, void* marks, size_t marks_bytes, const void* arena,
                                 size_t arena_bytes, bool unchecked)
    : arena_(static_cast<const unsigned char*>(arena)), unchecked_(unchecked) {
    if (table_bytes < directory::kPageBytes) throw std::invalid_argument("the directory is too small");
    std::memcpy(&header_, table, sizeof header_);  // once: nobody can change what was checked
    const bool known = header_.magic == directory::kMagic && header_.version == directory::kVersion &&
                       header_.entry_bytes == sizeof(directory::Entry);
    if (!known) throw std::invalid_argument("not a directory of this version");
    const bool fits = std::has_single_bit(header_.buckets) && header_.buckets <= kEntriesMax && header_.entries <= kEntriesMax &&
                      table_bytes >= directory::table_bytes(header_.buckets, header_.entries) &&
                      marks_bytes >= directory::marks_bytes(header_.entries) && header_.arena_bytes <= arena_bytes;
    if (!fits) throw std::invalid_argument("the directory's parts do not fit each other");
    const char* at = static_cast<const char*>(table);
    buckets_ = reinterpret_cast<const directory::Bucket*>(at + directory::buckets_at());
    entries_ = reinterpret_cast<const directory::Entry*>(at + directory::entries_at(header_.buckets));
    counts_ = static_cast<directory::Counts*>(marks);
    marks_ = reinterpret_cast<std::atomic<unsigned char>*>(static_cast<char*>(marks) + directory::marks_at());
}

bool DirectoryReader::is(const directory::Entry& entry, uint64_t space, std::string_view key) const {
    if (entry.space.load(kRelaxed) != space || entry.key_bytes.load(kRelaxed) != key.size()) return false;
    uint64_t words[directory::kKeyBytes / 8] = {};
    std::memcpy(words, key.data(), key.size());
    for (size_t i = 0; i < directory::kKeyBytes / 8; ++i)
        if (entry.key[i].load(kRelaxed) != words[i]) return false;
    return true;
}

bool DirectoryReader::find(uint64_t space, std::string_view key, uint64_t length, Found* out) const {
    if (key.size() > directory::kKeyBytes) return false;
    const directory::Hash hash = directory::hash_of(header_.seed, space, key.data(), key.size());
    for (const uint64_t which : {hash.first, hash.second}) {
        for (const directory::Way& way : bucket(which).ways) {
            const uint64_t found = way.load(std::memory_order_acquire);
            const uint64_t number = (found & 0xFFFFFFFF) - 1;
            if (found == 0 || static_cast<uint32_t>(found >> 32) != hash.tag || number >= header_.entries) continue;
            const directory::Entry& entry = entries_[number];
            const uint64_t version = entry.version.load(std::memory_order_acquire);
            if (version % 2 != 0 || !is(entry, space, key)) continue;
            const uint64_t offset = entry.offset.load(kRelaxed);
            const bool inside = length <= header_.arena_bytes && offset <= header_.arena_bytes - length;
            if (entry.length.load(kRelaxed) != length || !inside) continue;
            *out = {&entry, version, offset};
            return true;
        }
    }
    return false;
}

bool DirectoryReader::has(uint64_t space, std::string_view key, uint64_t length) const {
    Found found;
    return find(space, key, length, &found);
}

bool DirectoryReader::copy(uint64_t space, std::string_view key, unsigned char* out, uint64_t length,
                           bool away, bool count) const {
    Found found;
    if (!find(space, key, length, &found)) return false;
    if (!guarded_copy(out, arena_ + found.offset, length, CopyDeadline::max(), away)) return false;
    std::atomic_thread_fence(std::memory_order_acquire);
    if (found.entry->version.load(kRelaxed) != found.version && !unchecked_) return false;
    if (!count) return true;
    marks_[found.entry - entries_].store(1, kRelaxed);
    counts_->blocks.fetch_add(1, kRelaxed);
    counts_->bytes.fetch_add(length, kRelaxed);
    return true;
}

DirectoryReader::Proof DirectoryReader::copy_proven(uint64_t space, std::string_view key, unsigned char* out, uint64_t length,
                                                    Digest* digest) const {
    Found found;
    if (!find(space, key, length, &found)) return Proof::gone;
    uint64_t sum[2];
    for (size_t i = 0; i < 2; ++i) sum[i] = found.entry->checksum[i].load(kRelaxed);
    if (!guarded_copy_hash(out, arena_ + found.offset, length, CopyDeadline::max(), digest)) return Proof::gone;
    std::atomic_thread_fence(std::memory_order_acquire);
    if (found.entry->version.load(kRelaxed) != found.version && !unchecked_) return Proof::gone;
    if (std::memcmp(digest->data(), sum, sizeof sum) != 0) return Proof::wrong;
    marks_[found.entry - entries_].store(1, kRelaxed);
    return Proof::good;
}

}  // namespace p2pkv
