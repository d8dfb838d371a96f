#include "hash_impl.hpp"

namespace p2pkv {
const HashOps hash_ops_avx2{oneshot, reset, update, digest, "avx2"};
}  // namespace p2pkv
