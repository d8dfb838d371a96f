// Python's view of the index: buffers in, packed little-endian bytes out, the GIL released in between.
// Types and meaning are documented in p2pkv/index/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>

#include "entries.hpp"
#include "lookup.hpp"
#include "prefix_index.hpp"
#include "token_chain.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using p2pkv::index::IndexFull;
using p2pkv::index::Key;
using p2pkv::index::Keys;
using p2pkv::index::kTierMax;
using p2pkv::index::mix64;
using p2pkv::index::PrefixIndex;
using p2pkv::index::token_chain;
using p2pkv::index::Tokens;

/// A buffer of packed u64 keys, held for as long as this lives: the exporter cannot free or resize it meanwhile.
/// Must be made and destroyed with the GIL held.
class KeysBuffer {
 public:
  explicit KeysBuffer(nb::handle source) {
    if (PyBytes_CheckExact(source.ptr())) {  // what most callers have: no view needed, and a small one costs as much as its use
      bytes_ = nb::borrow(source);
      set(PyBytes_AS_STRING(source.ptr()), PyBytes_GET_SIZE(source.ptr()));
      return;
    }
    // Without PyBUF_STRIDES the exporter must refuse what is not contiguous.
    if (PyObject_GetBuffer(source.ptr(), &view_, PyBUF_ND | PyBUF_FORMAT) != 0) {
      if (PyErr_ExceptionMatches(PyExc_TypeError)) throw nb::python_error();
      PyErr_Clear();
      throw std::invalid_argument("keys must be one contiguous buffer");
    }
    try {
      check_format();
      set(view_.buf, view_.len);
    } catch (...) {
      PyBuffer_Release(&view_);
      throw;
    }
  }
  ~KeysBuffer() { PyBuffer_Release(&view_); }  // nothing where there is no view
  KeysBuffer(const KeysBuffer&) = delete;
  KeysBuffer& operator=(const KeysBuffer&) = delete;

  Keys keys() const { return {data_, size_}; }

 private:
  void set(const void* data, Py_ssize_t bytes) {
    if (bytes % static_cast<Py_ssize_t>(sizeof(Key)) != 0)
      throw std::invalid_argument("keys must be a multiple of 8 bytes long, not " + std::to_string(bytes));
    data_ = data;
    size_ = static_cast<std::size_t>(bytes) / sizeof(Key);
  }

  void check_format() const {
    const char* format = view_.format == nullptr ? "B" : view_.format;
    // '<', '=' and '@' all mean this machine's order here (see the static_assert on endianness).
    const char* type = format[0] != '\0' && format[1] != '\0' && std::strchr("<=@", format[0]) != nullptr ? format + 1 : format;
    const bool one = type[0] != '\0' && type[1] == '\0';
    const bool words = one && view_.itemsize == sizeof(Key) && std::strchr("QqLl", type[0]) != nullptr;
    const bool bytes = one && view_.itemsize == 1 && std::strchr("Bbc", type[0]) != nullptr;
    if (!words && !bytes)
      throw std::invalid_argument("keys must be packed 64-bit integers or bytes in little-endian order, not items of format '" +
                                  std::string(format) + "'");
  }

  nb::object bytes_;
  const void* data_ = nullptr;
  std::size_t size_ = 0;
  Py_buffer view_{};
};

/// A buffer of token ids, held for as long as this lives. Must be made and destroyed with the GIL held.
class TokensBuffer {
 public:
  explicit TokensBuffer(nb::handle source) {
    if (PyObject_GetBuffer(source.ptr(), &view_, PyBUF_ND | PyBUF_FORMAT) != 0) {
      if (PyErr_ExceptionMatches(PyExc_TypeError)) throw nb::python_error();
      PyErr_Clear();
      throw std::invalid_argument("tokens must be one contiguous buffer");
    }
    const char* format = view_.format == nullptr ? "B" : view_.format;
    const char* type = std::strchr("<=@", format[0]) != nullptr && format[0] != '\0' ? format + 1 : format;
    if (type[0] == '\0' || type[1] != '\0' || std::strchr("iIlLqQ", type[0]) == nullptr ||
        (view_.itemsize != 4 && view_.itemsize != 8)) {
      const std::string shown = format;
      PyBuffer_Release(&view_);
      throw std::invalid_argument("tokens must be integers of 32 or 64 bits, not items of format '" + shown + "'");
    }
    is_signed_ = std::strchr("ilq", type[0]) != nullptr;
  }
  ~TokensBuffer() { PyBuffer_Release(&view_); }
  TokensBuffer(const TokensBuffer&) = delete;
  TokensBuffer& operator=(const TokensBuffer&) = delete;

  Tokens tokens() const {
    const auto width = static_cast<std::size_t>(view_.itemsize);
    return {view_.buf, static_cast<std::size_t>(view_.len) / width, width, is_signed_};
  }

 private:
  Py_buffer view_{};
  bool is_signed_ = false;
};

template <typename T>
nb::bytes pack(const std::vector<T>& items) {
  return nb::bytes(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T));
}

/// Runs f() without the GIL. f must not touch a Python object.
template <typename F>
auto unlocked(F&& f) {
  const nb::gil_scoped_release release;
  return f();
}

nb::bytes contains_any(const PrefixIndex& index, nb::handle keys) {
  const KeysBuffer buffer(keys);
  // Written in place: nobody else can see a bytes object that has not been returned yet.
  PyObject* out = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(buffer.keys().size()));
  if (out == nullptr) throw nb::python_error();
  auto result = nb::steal<nb::bytes>(out);
  auto* bytes = reinterpret_cast<unsigned char*>(PyBytes_AS_STRING(out));
  unlocked([&] { index.contains_any(buffer.keys(), bytes); });
  return result;
}

std::size_t replace(PrefixIndex& index, std::int64_t node, nb::iterable groups) {
  std::vector<std::unique_ptr<KeysBuffer>> buffers;
  std::vector<PrefixIndex::Group> native;
  for (nb::handle group : groups) {
    std::pair<std::int64_t, nb::object> pair;
    if (!nb::try_cast(group, pair)) throw nb::type_error("groups must be pairs of a tier and a buffer of keys");
    const auto& [tier, keys] = pair;
    buffers.push_back(std::make_unique<KeysBuffer>(keys));
    native.emplace_back(tier, buffers.back()->keys());
  }
  return unlocked([&] { return index.replace(node, native); });
}

nb::list snapshot(const PrefixIndex& index, std::int64_t node) {
  const auto by_tier = unlocked([&] { return index.snapshot(node); });
  nb::list out;
  for (std::uint32_t i = 0; i < kTierMax; ++i)
    if (!by_tier[i].empty()) out.append(nb::make_tuple(i + 1, pack(by_tier[i])));
  return out;
}

nb::tuple dump_pages(const PrefixIndex& index, const std::vector<std::uint32_t>& slots, std::size_t from, std::size_t bytes_most) {
  std::vector<unsigned char> out;
  const std::size_t next = unlocked([&] { return index.dump_pages(slots, from, bytes_most, out); });
  return nb::make_tuple(pack(out), next);
}

std::size_t load_pages(PrefixIndex& index, nb::handle data, const std::vector<std::int64_t>& slots) {
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw nb::python_error();
  const std::unique_ptr<Py_buffer, decltype(&PyBuffer_Release)> held(&view, PyBuffer_Release);
  const auto size = static_cast<std::size_t>(view.len);
  return unlocked([&] { return index.load_pages(static_cast<const unsigned char*>(view.buf), size, slots); });
}

nb::dict stats(const PrefixIndex& index) {
  const auto stats = unlocked([&] { return index.stats(); });
  nb::dict out;
  out["nodes"] = stats.nodes;
  out["hidden_nodes"] = stats.hidden_nodes;
  out["keys"] = stats.keys;
  out["entries"] = stats.entries;
  out["pages"] = stats.pages;
  out["capacity_keys"] = stats.capacity;
  out["memory_bytes"] = stats.bytes;
  return out;
}

std::uint64_t entries_checksum(nb::handle keys, std::int64_t tier) {
  const KeysBuffer buffer(keys);
  if (tier < 1 || tier > kTierMax) throw std::invalid_argument("tier " + std::to_string(tier) + " is not within 1..4");
  return unlocked([&] {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < buffer.keys().size(); ++i)
      sum ^= p2pkv::index::entry_checksum(buffer.keys()[i], static_cast<std::uint32_t>(tier));
    return sum;
  });
}

nb::bytes index_keys(std::uint64_t namespace_, nb::sequence hashes) {
  std::vector<Key> out;
  out.reserve(nb::len(hashes));
  const std::uint64_t salt = p2pkv::index::mix64(namespace_);
  for (nb::handle hash : hashes) {
    if (!PyBytes_Check(hash.ptr())) throw nb::type_error("a block hash must be bytes");
    if (PyBytes_GET_SIZE(hash.ptr()) < static_cast<Py_ssize_t>(sizeof(Key)))
      throw std::invalid_argument("a block hash must be at least 8 bytes long");
    Key key;
    std::memcpy(&key, PyBytes_AS_STRING(hash.ptr()), sizeof(Key));
    out.push_back(key ^ salt);
  }
  return pack(out);
}

/// What each character stands for in hexadecimal; 16: nothing.
constexpr auto kDigits = [] {
  std::array<unsigned char, 256> digits{};
  digits.fill(16);
  for (unsigned char i = 0; i < 10; ++i) digits['0' + i] = i;
  for (unsigned char i = 0; i < 6; ++i) digits['a' + i] = digits['A' + i] = static_cast<unsigned char>(10 + i);
  return digits;
}();

/// First 8 bytes of a hash in hexadecimal (8 to 64 bytes). False: it is none.
bool key_of_hex(nb::handle text, Key* key) {
  Py_ssize_t length;
  const char* text_ = PyUnicode_AsUTF8AndSize(text.ptr(), &length);
  if (text_ == nullptr) {
    PyErr_Clear();  // half of a surrogate pair
    return false;
  }
  if (length < 16 || length > 128 || length % 2 != 0) return false;
  const auto* at = reinterpret_cast<const unsigned char*>(text_);
  unsigned char bytes[sizeof(Key)];
  unsigned all = 0;
  for (unsigned i = 0; i < sizeof(Key); ++i) {
    const unsigned high = kDigits[at[2 * i]], low = kDigits[at[2 * i + 1]];
    all |= high | low;
    bytes[i] = static_cast<unsigned char>(high << 4U | low);
  }
  for (Py_ssize_t i = 16; i < length; ++i) all |= kDigits[at[i]];
  std::memcpy(key, bytes, sizeof bytes);
  return all < 16;
}

/// Hashes as HTTP callers write them, hexadecimal or as numbers, to packed hashes of 8 bytes.
nb::bytes parse_hashes(nb::sequence hashes) {
  std::vector<Key> out;
  out.reserve(nb::len(hashes));
  for (nb::handle hash : hashes) {
    Key key = 0;
    bool good;
    if (PyLong_CheckExact(hash.ptr())) {
      key = PyLong_AsUnsignedLongLong(hash.ptr());
      good = PyErr_Occurred() == nullptr;
      PyErr_Clear();
    } else {
      good = PyUnicode_Check(hash.ptr()) && key_of_hex(hash, &key);
    }
    if (!good) throw std::invalid_argument(std::to_string(out.size()));
    out.push_back(key);
  }
  return pack(out);
}

nb::bytes salted(nb::handle hashes, std::uint64_t namespace_) {
  const KeysBuffer buffer(hashes);
  const std::uint64_t salt = p2pkv::index::mix64(namespace_);
  std::vector<Key> out(buffer.keys().size());
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = buffer.keys()[i] ^ salt;
  return pack(out);
}

template <std::vector<Key> (*kChain)(const Tokens&, std::int64_t, std::uint64_t)>
nb::bytes chained(nb::handle source, std::int64_t block_tokens, std::uint64_t root) {
  const TokensBuffer buffer(source);
  return pack(unlocked([&] { return kChain(buffer.tokens(), block_tokens, root); }));
}

}  // namespace

namespace {

/// What p2pkv._native asks instead of Python (see lookup.hpp).
std::size_t holders_of_all(void* index, const std::uint64_t* keys, std::size_t count, std::uint32_t* slots,
                           std::size_t most) {
  std::size_t found = 0;
  for (const auto& row : static_cast<const PrefixIndex*>(index)->match(Keys(keys, count), false))
    if (row.depth == count && row.node != 0 && found < most) slots[found++] = row.node;  // 0: this node itself
  return found;
}

/// What the gossip core writes to (see entries.hpp). Errors become answers: no exception crosses to another extension.
class IndexEntries final : public p2pkv::index::Entries {
 public:
  explicit IndexEntries(PrefixIndex& index) : index_(index) {}

  bool apply(std::uint32_t slot, const void* keys, std::size_t count, std::uint32_t tier) override {
    return within_bounds([&] { index_.apply(slot, Keys(keys, count), tier); });
  }
  bool replace(std::uint32_t slot, const std::vector<p2pkv::index::TierKeys>& groups) override {
    return within_bounds([&] {
      std::vector<PrefixIndex::Group> taken;
      taken.reserve(groups.size());
      for (const auto& group : groups) taken.emplace_back(group.tier, Keys(group.keys, group.count));
      index_.replace(slot, taken);
    });
  }
  void remove(std::uint32_t slot) override {
    within_bounds([&] { index_.remove_node(slot); });
  }
  void hide(std::uint32_t slot, bool hidden) override {
    within_bounds([&] { index_.hide(slot, hidden); });
  }
  std::uint64_t checksum(std::uint32_t slot) const override { return index_.checksum(slot); }
  std::size_t count(std::uint32_t slot) const override { return index_.count(slot); }
  void list(std::uint32_t slot, std::vector<std::uint64_t> (&by_tier)[4]) const override {
    auto keys = index_.snapshot(slot);
    for (std::size_t t = 0; t < 4; ++t) by_tier[t] = std::move(keys[t]);
  }

 private:
  template <typename Work>
  static bool within_bounds(Work&& work) {
    try {
      work();
      return true;
    } catch (const std::exception&) {  // IndexFull, or no memory: slots and tiers are the caller's own
      return false;
    }
  }

  PrefixIndex& index_;
};

nb::object entries(nb::handle self) {
  auto* made = new IndexEntries(*nb::cast<PrefixIndex*>(self));
  return nb::capsule(static_cast<p2pkv::index::Entries*>(made), p2pkv::index::kEntriesCapsule, [](void* p) noexcept {
    delete static_cast<IndexEntries*>(static_cast<p2pkv::index::Entries*>(p));
  });
}

nb::object lookup(nb::handle self) {
  auto* table = new p2pkv::index::Lookup{nb::cast<PrefixIndex*>(self), holders_of_all};
  return nb::capsule(table, p2pkv::index::kLookupCapsule,
                     [](void* p) noexcept { delete static_cast<p2pkv::index::Lookup*>(p); });
}

}  // namespace

NB_MODULE(_core, m) {
  nb::set_leak_warnings(false);  // what lives as long as the process is no leak, and nobody's business at its end
  nb::exception<IndexFull>(m, "IndexFull", PyExc_RuntimeError);

  nb::class_<PrefixIndex>(m, "PrefixIndex")
      .def(nb::init<std::int64_t, std::int64_t>(), "max_nodes"_a, "max_entries"_a)
      .def(
          "apply",
          [](PrefixIndex& index, std::int64_t node, nb::handle keys, std::int64_t tier) {
            const KeysBuffer buffer(keys);
            return unlocked([&] { return index.apply(node, buffer.keys(), tier); });
          },
          "node"_a, "keys"_a, "tier"_a)
      .def("replace", replace, "node"_a, "groups"_a)
      .def("remove_node", &PrefixIndex::remove_node, "node"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("hide", &PrefixIndex::hide, "node"_a, "hidden"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "match",
          [](const PrefixIndex& index, nb::handle keys, bool beyond) {
            const KeysBuffer buffer(keys);
            return nb::make_tuple(pack(unlocked([&] { return index.match(buffer.keys(), beyond); })), buffer.keys().size());
          },
          "keys"_a, "beyond"_a = false)
      .def(
          "match_tokens",
          [](const PrefixIndex& index, nb::handle source, std::int64_t block_tokens, std::uint64_t namespace_,
             std::uint64_t seed, bool beyond) {
            const TokensBuffer buffer(source);
            std::size_t blocks = 0;
            auto rows = unlocked([&] {
              std::vector<Key> keys = token_chain(buffer.tokens(), block_tokens, seed);
              for (Key& key : keys) key ^= mix64(namespace_);
              blocks = keys.size();
              return index.match(Keys(keys.data(), keys.size()), beyond);
            });
            return nb::make_tuple(pack(rows), blocks);
          },
          "tokens"_a, "block_tokens"_a, "namespace_"_a, "seed"_a, "beyond"_a = false)
      .def(
          "holders",
          [](const PrefixIndex& index, nb::handle keys, std::int64_t limit, std::int64_t start) {
            const KeysBuffer buffer(keys);
            return pack(unlocked([&] { return index.holders(buffer.keys(), limit, start); }));
          },
          "keys"_a, "limit"_a, "start"_a)
      .def("contains_any", contains_any, "keys"_a)
      .def(
          "reach",
          [](const PrefixIndex& index, nb::handle keys) {
            const KeysBuffer buffer(keys);
            return unlocked([&] { return index.reach(buffer.keys()); });
          },
          "keys"_a)
      .def("snapshot", snapshot, "node"_a)
      .def("dump_pages", dump_pages, "slots"_a, "start"_a, "bytes_most"_a)
      .def("load_pages", load_pages, "data"_a, "slots"_a)
      .def("checksum", &PrefixIndex::checksum, "node"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("count", &PrefixIndex::count, "node"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("top", &PrefixIndex::top, nb::call_guard<nb::gil_scoped_release>())
      .def("stats", stats)
      .def_prop_ro("lookup", lookup)
      .def_prop_ro("entries", entries);

  m.def("entries_checksum", entries_checksum, "keys"_a, "tier"_a);
  m.def("token_chain", chained<token_chain>, "tokens"_a, "block_tokens"_a, "seed"_a);
  m.def("mooncake_chain", chained<p2pkv::index::mooncake_chain>, "tokens"_a, "block_tokens"_a, "root"_a);
  m.def(
      "dynamo_hashes",
      [](nb::handle source, std::int64_t block_tokens, std::uint64_t seed) {
        const TokensBuffer buffer(source);
        const auto hashes =
            unlocked([&] { return p2pkv::index::dynamo_hashes(buffer.tokens(), block_tokens, seed); });
        return nb::make_tuple(pack(hashes.local), pack(hashes.sequence));
      },
      "tokens"_a, "block_tokens"_a, "seed"_a);
  m.def("parse_hashes", parse_hashes, "hashes"_a);
  m.def("salted", salted, "hashes"_a, "namespace"_a);
  m.def("index_keys", index_keys, "namespace"_a, "hashes"_a);
  m.def("mix64", &p2pkv::index::mix64, "x"_a);
}
