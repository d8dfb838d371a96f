// Copies that survive memory going away underneath them.
//
// An engine's region is a file that the engine can truncate at any time; touching a mapped page behind its end raises
// SIGBUS, which would kill the agent. guarded_copy() turns that into a return value.
//
// Every copy also has a deadline, looked at before each piece: an agent that was stopped (SIGSTOP) and wakes up must not
// go on writing into slots that their engine has meanwhile given to somebody else.
#pragma once
#include <chrono>
#include <cstddef>

#include "hash.hpp"

namespace p2pkv {

using CopyDeadline = std::chrono::steady_clock::time_point;

// Copy `length` bytes; false when a page of either side is gone or the deadline passed (some bytes may have been copied).
bool guarded_copy(void* dst, const void* src, size_t length, CopyDeadline deadline);

// `away`: past the caches (copy.hpp); the former decides by the length.
bool guarded_copy(void* dst, const void* src, size_t length, CopyDeadline deadline, bool away);

// Copy and checksum in one pass: each piece is hashed while it is hot in the cache. The digest is of the bytes that
// were written to `dst`, so that a source which changes meanwhile cannot make digest and copy differ.
bool guarded_copy_hash(void* dst, const void* src, size_t length, CopyDeadline deadline, Digest* digest);

bool guarded_hash(const void* src, size_t length, Digest* digest);

}  // namespace p2pkv
