// A file's memory, mapped where huge pages can be mapped as such, and its pages provided.
#pragma once
#include <cstddef>
#include <cstdint>

namespace p2pkv {

constexpr size_t kHugePageBytes = 2 << 20;

// The first `length` bytes of a file, shared, from an address that is a multiple of a huge page: elsewhere the kernel maps
// every 4 KiB of a huge page one by one. Unmapped when this ends.
class Mapping {
  public:
    // Throws std::system_error.
    Mapping(int fd, size_t length, bool writable);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    void* data() const { return data_; }
    size_t size() const { return length_; }
    bool writable() const { return writable_; }

  private:
    void* data_;
    const size_t length_;
    const bool writable_;
};

// Have the kernel provide pages now; what is in them stays. 0, or errno.
int populate(uintptr_t address, size_t length);

// Have the whole huge pages of this range be huge pages, whatever the system's settings for transparent huge pages say:
// madvise's MADV_COLLAPSE (Linux 6.1) is for programs that know. What is in them stays. How many bytes are in huge pages now.
size_t collapse(uintptr_t address, size_t length);

}  // namespace p2pkv
