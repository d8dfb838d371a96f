#include "mapping.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace p2pkv {
namespace {

// linux/mman.h, for older headers
constexpr int kPopulateWrite = 23;  // since Linux 5.14
constexpr int kCollapse = 25;       // since Linux 6.1
constexpr size_t kPageBytes = 4096;

int advise(uintptr_t address, size_t length, int advice) {
    while (madvise(reinterpret_cast<void*>(address), length, advice) != 0)
        if (errno != EINTR) return errno;
    return 0;
}

uintptr_t up(uintptr_t address) { return (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes; }

}  // namespace

Mapping::Mapping(int fd, size_t length, bool writable) : length_(length), writable_(writable) {
    const auto fail = [] { throw std::system_error(errno, std::generic_category()); };
    const size_t room = length + kHugePageBytes;
    void* reserved = mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) fail();
    const auto begin = reinterpret_cast<uintptr_t>(reserved), at = up(begin);
    const int access = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    data_ = mmap(reinterpret_cast<void*>(at), length, access, MAP_SHARED | MAP_FIXED, fd, 0);
    if (data_ == MAP_FAILED) {
        const int error = errno;
        munmap(reserved, room);
        errno = error;
        fail();
    }
    if (at > begin) munmap(reserved, at - begin);
    const uintptr_t end = (at + length + kPageBytes - 1) / kPageBytes * kPageBytes;
    if (begin + room > end) munmap(reinterpret_cast<void*>(end), begin + room - end);
}

Mapping::~Mapping() { munmap(data_, length_); }

int populate(uintptr_t address, size_t length) { return advise(address, length, kPopulateWrite); }

size_t collapse(uintptr_t address, size_t length) {
    size_t done = 0;
    for (uintptr_t at = up(address); at + kHugePageBytes <= address + length; at += kHugePageBytes) {
        // There has to be something to collapse; the rest of a huge page comes with it.
        if (populate(at, kPageBytes) != 0) break;
        if (advise(at, kHugePageBytes, kCollapse) == 0) done += kHugePageBytes;
    }
    return done;
}

}  // namespace p2pkv
