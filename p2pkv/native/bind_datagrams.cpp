// Many datagrams at a time: one frame to all members of a cell, and whatever has come. The GIL is released meanwhile.
#include <nanobind/nanobind.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr size_t kBatch = 64;
constexpr size_t kDatagramMax = 2'048;

/// Sends `frame` to each of the socket addresses, packed one behind the other; returns how many the socket took. One that
/// it cannot send now is lost, as on the way.
size_t send_to_all(int fd, const nb::bytes& frame, const nb::bytes& addresses, size_t address_bytes) {
    if (address_bytes == 0 || address_bytes > sizeof(sockaddr_storage) || addresses.size() % address_bytes != 0)
        throw nb::value_error("send_to_all: addresses are not whole");
    const size_t count = addresses.size() / address_bytes;
    iovec data{const_cast<char*>(frame.c_str()), frame.size()};
    const char* at = addresses.c_str();
    nb::gil_scoped_release release;
    std::array<mmsghdr, kBatch> messages;
    size_t sent = 0;
    for (size_t from = 0; from < count;) {
        const size_t some = std::min(kBatch, count - from);
        for (size_t i = 0; i < some; ++i) {
            messages[i] = {};
            messages[i].msg_hdr.msg_name = const_cast<char*>(at + (from + i) * address_bytes);
            messages[i].msg_hdr.msg_namelen = static_cast<socklen_t>(address_bytes);
            messages[i].msg_hdr.msg_iov = &data;
            messages[i].msg_hdr.msg_iovlen = 1;
        }
        const int done = sendmmsg(fd, messages.data(), static_cast<unsigned>(some), MSG_DONTWAIT);
        if (done > 0) {
            sent += static_cast<size_t>(done);
            from += static_cast<size_t>(done);
        } else if (errno != EINTR) {
            ++from;  // no route to it, or no room in the socket: the next one may have more luck
        }
    }
    return sent;
}

/// What has come, at most `most` datagrams, as (bytes, address as the kernel writes it). Empty: nothing.
nb::list receive_all(int fd, size_t most) {
    static thread_local std::vector<char> room(kBatch * kDatagramMax);
    static thread_local std::array<sockaddr_storage, kBatch> sources;
    std::array<mmsghdr, kBatch> messages;
    std::array<iovec, kBatch> data;
    nb::list out;
    while (nb::len(out) < most) {
        const size_t some = std::min(kBatch, most - nb::len(out));
        for (size_t i = 0; i < some; ++i) {
            data[i] = {room.data() + i * kDatagramMax, kDatagramMax};
            messages[i] = {};
            messages[i].msg_hdr.msg_name = &sources[i];
            messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_storage);
            messages[i].msg_hdr.msg_iov = &data[i];
            messages[i].msg_hdr.msg_iovlen = 1;
        }
        int done;
        {
            nb::gil_scoped_release release;
            done = recvmmsg(fd, messages.data(), static_cast<unsigned>(some), MSG_DONTWAIT, nullptr);
        }
        if (done <= 0) break;
        for (int i = 0; i < done; ++i)
            out.append(nb::make_tuple(nb::bytes(room.data() + static_cast<size_t>(i) * kDatagramMax, messages[i].msg_len),
                                      nb::bytes(reinterpret_cast<const char*>(&sources[i]), messages[i].msg_hdr.msg_namelen)));
        if (static_cast<size_t>(done) < some) break;
    }
    return out;
}

}  // namespace

void bind_datagrams(nb::module_& m) {
    m.def("send_to_all", send_to_all, "fd"_a, "frame"_a, "addresses"_a, "address_bytes"_a);
    m.def("receive_all", receive_all, "fd"_a, "most"_a);
}
