#include "hash_impl.hpp"

namespace p2pkv {
const HashOps hash_ops_avx512{oneshot, reset, update, digest, "avx512"};
}  // namespace p2pkv
