#include "hash_impl.hpp"

namespace p2pkv {

const HashOps hash_ops_baseline{oneshot, reset, update, digest, "baseline"};

const HashOps& hash_ops() {
#if defined(__x86_64__)
    static const HashOps& chosen = __builtin_cpu_supports("avx512f") ? hash_ops_avx512
                                   : __builtin_cpu_supports("avx2")  ? hash_ops_avx2
                                                                     : hash_ops_baseline;
    return chosen;
#else
    return hash_ops_baseline;
#endif
}

}  // namespace p2pkv
