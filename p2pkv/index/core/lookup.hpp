// What other native code may ask of the prefix index without going through Python: two plain C types, so that nothing
// but this header has to be shared between the extensions.
#pragma once
#include <cstddef>
#include <cstdint>

namespace p2pkv::index {

struct Lookup {
  void* index;
  // Slots of visible nodes that hold all of these keys, at most `most`; returns how many were written. Thread-safe.
  std::size_t (*holders_of_all)(void* index, const std::uint64_t* keys, std::size_t count, std::uint32_t* slots,
                                std::size_t most);
};

inline constexpr const char* kLookupCapsule = "p2pkv.index.Lookup";

}  // namespace p2pkv::index
