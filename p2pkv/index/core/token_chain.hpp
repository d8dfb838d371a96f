// Tokens to keys. p2pkv's own chained hash is for callers who have token ids and no engine's hashes:
//
//   h(i) = XXH3-64(h(i-1) || tokens of block i)        h(-1) = seed
//
// all little-endian, 8 bytes of parent and 4 bytes per token; full blocks only. One call for a prompt, because the chain
// is too short a computation per block to be worth anything else: 512 blocks of 16 tokens are some microseconds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "keys.hpp"

namespace p2pkv::index {

/// A caller's token ids, 4 or 8 bytes each, little-endian. Borrowed, may be unaligned.
struct Tokens {
  const void* data;
  std::size_t size;
  std::size_t width;
  bool is_signed;
};

/// One hash per full block. Throws std::invalid_argument for a block without tokens, and for an id that is negative or beyond 32 bits.
std::vector<Key> token_chain(const Tokens& tokens, std::int64_t block_tokens, std::uint64_t seed);

/// Dynamo's hashes of each full block: XXH3-64 of its tokens alone, and its place in the chain.
struct DynamoHashes {
  std::vector<Key> local;
  std::vector<Key> sequence;
};

/// `seed` is that of the local hashes; the chain's is fixed. Throws as token_chain does.
DynamoHashes dynamo_hashes(const Tokens& tokens, std::int64_t block_tokens, std::uint64_t seed);

/// Mooncake's conductor before it took vLLM's recipes over: XXH64(h(i-1) || tokens of block i), h(-1) = `root`. Throws as
/// token_chain does.
std::vector<Key> mooncake_chain(const Tokens& tokens, std::int64_t block_tokens, std::uint64_t root);

}  // namespace p2pkv::index
