// Little-endian fields, written and read in order. Reading never goes past the end: it fails, and stays failed.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

namespace p2pkv::gossip {

static_assert(std::endian::native == std::endian::little, "fields are copied as they are");

/// What is sent or was received: shared, never changed.
using Payload = std::shared_ptr<const std::string>;

class Writer {
 public:
  explicit Writer(std::size_t expected) { out_.reserve(expected); }

  template <typename T>
  Writer& put(T value) {
    char raw[sizeof value];
    std::memcpy(raw, &value, sizeof value);
    out_.append(raw, sizeof value);
    return *this;
  }
  Writer& raw(const void* data, std::size_t size) {
    out_.append(static_cast<const char*>(data), size);
    return *this;
  }
  /// A length of this type, then the bytes.
  template <typename Length>
  Writer& text(std::string_view value) {
    return put(static_cast<Length>(value.size())).raw(value.data(), value.size());
  }
  std::size_t size() const { return out_.size(); }
  Payload done() { return std::make_shared<const std::string>(std::move(out_)); }

 private:
  std::string out_;
};

class Reader {
 public:
  Reader(const void* data, std::size_t size) : at_(static_cast<const char*>(data)), left_(size) {}

  template <typename T>
  T get() {
    T value{};
    if (const void* from = raw(sizeof value)) std::memcpy(&value, from, sizeof value);
    return value;
  }
  /// The next bytes; null when there are not so many.
  const char* raw(std::size_t size) {
    if (failed_ || left_ < size) {
      failed_ = true;
      return nullptr;
    }
    const char* from = at_;
    at_ += size;
    left_ -= size;
    return from;
  }
  template <typename Length>
  std::string_view text() {
    const std::size_t size = get<Length>();
    const char* from = raw(size);
    return from == nullptr ? std::string_view{} : std::string_view{from, size};
  }
  std::size_t left() const { return left_; }
  bool failed() const { return failed_; }
  /// Everything was there, and nothing else.
  bool ended() const { return !failed_ && left_ == 0; }

 private:
  const char* at_;
  std::size_t left_;
  bool failed_ = false;
};

}  // namespace p2pkv::gossip
