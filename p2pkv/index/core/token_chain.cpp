#include "token_chain.hpp"

#define XXH_INLINE_ALL
#include <cstring>
#include <stdexcept>
#include <string>

#include "xxhash.h"

namespace p2pkv::index {
namespace {

constexpr std::size_t kTokenBytes = sizeof(std::uint32_t);

template <typename Id>
void copy_tokens(const Tokens& tokens, std::size_t from, std::size_t count, unsigned char* out) {
  const auto* at = static_cast<const unsigned char*>(tokens.data) + from * sizeof(Id);
  std::uint64_t all = 0;
  for (std::size_t i = 0; i < count; ++i) {
    Id id;
    std::memcpy(&id, at + i * sizeof id, sizeof id);
    all |= static_cast<std::uint64_t>(static_cast<std::int64_t>(id));  // with the sign's bits
    const auto narrow = static_cast<std::uint32_t>(id);
    std::memcpy(out + i * kTokenBytes, &narrow, kTokenBytes);
  }
  if (all >> 32U != 0) throw std::invalid_argument("a token id is negative, or does not fit 32 bits");
}

/// As 32-bit ids.
void copy(const Tokens& tokens, std::size_t from, std::size_t count, unsigned char* out) {
  if (tokens.width == sizeof(std::uint64_t)) return copy_tokens<std::uint64_t>(tokens, from, count, out);
  if (tokens.is_signed) return copy_tokens<std::int32_t>(tokens, from, count, out);
  std::memcpy(out, static_cast<const unsigned char*>(tokens.data) + from * kTokenBytes, count * kTokenBytes);
}

/// Calls each(number, bytes of the block's tokens) for every full block, behind `room` bytes for the caller.
template <typename Each>
void for_each_block(const Tokens& tokens, std::int64_t block_tokens, std::size_t room, Each&& each) {
  if (block_tokens < 1) throw std::invalid_argument("block_tokens must be at least 1, not " + std::to_string(block_tokens));
  const auto block = static_cast<std::size_t>(block_tokens);
  const std::size_t blocks = tokens.size / block;
  if (blocks == 0) return;
  std::vector<unsigned char> input(room + block * kTokenBytes);
  for (std::size_t i = 0; i < blocks; ++i) {
    copy(tokens, i * block, block, input.data() + room);
    each(input);
  }
}

/// h(i) = hash(h(i-1) || tokens of block i), h(-1) = root.
template <typename Hash>
std::vector<Key> chain(const Tokens& tokens, std::int64_t block_tokens, Key root, Hash&& hash) {
  std::vector<Key> out;
  if (block_tokens > 0) out.reserve(tokens.size / static_cast<std::size_t>(block_tokens));
  Key parent = root;
  for_each_block(tokens, block_tokens, sizeof parent, [&](std::vector<unsigned char>& input) {
    std::memcpy(input.data(), &parent, sizeof parent);
    out.push_back(parent = hash(input.data(), input.size()));
  });
  return out;
}

}  // namespace

std::vector<Key> token_chain(const Tokens& tokens, std::int64_t block_tokens, std::uint64_t seed) {
  return chain(tokens, block_tokens, seed, [](const void* data, std::size_t bytes) { return XXH3_64bits(data, bytes); });
}

std::vector<Key> mooncake_chain(const Tokens& tokens, std::int64_t block_tokens, std::uint64_t root) {
  return chain(tokens, block_tokens, root, [](const void* data, std::size_t bytes) { return XXH64(data, bytes, 0); });
}

DynamoHashes dynamo_hashes(const Tokens& tokens, std::int64_t block_tokens, std::uint64_t seed) {
  constexpr std::uint64_t kChainSeed = 1337;
  DynamoHashes out;
  for_each_block(tokens, block_tokens, 0, [&](std::vector<unsigned char>& input) {
    const Key local = XXH3_64bits_withSeed(input.data(), input.size(), seed);
    const Key both[2] = {out.local.empty() ? 0 : out.sequence.back(), local};
    out.sequence.push_back(out.local.empty() ? local : XXH3_64bits_withSeed(both, sizeof both, kChainSeed));
    out.local.push_back(local);
  });
  return out;
}

}  // namespace p2pkv::index
