// MessagePack without an object in between. A reader of the few kinds that messages are made of (unsigned integers, byte
// strings, text, arrays, booleans), which never reads behind its end and never allocates by what the input claims; a
// writer of the shortest form, as msgspec does.
#pragma once
#include <bit>
#include <cstdint>
#include <string>
#include <string_view>

namespace p2pkv::msgpack {

class Reader {
  public:
    explicit Reader(std::string_view data) : data_(data) {}

    // Each returns false, and the reader is spoilt, when the next item is not that.
    bool array(uint64_t* count) {
        unsigned char tag;
        if (!byte(&tag)) return false;
        if ((tag & 0xf0) == 0x90) return *count = tag & 0x0f, true;
        if (tag == 0xdc) return big_endian(2, count);
        if (tag == 0xdd) return big_endian(4, count);
        return spoil();
    }
    bool uint(uint64_t* value) {
        unsigned char tag;
        if (!byte(&tag)) return false;
        if (tag < 0x80) return *value = tag, true;
        if (tag >= 0xcc && tag <= 0xcf) return big_endian(size_t{1} << (tag - 0xcc), value);
        return spoil();
    }
    bool bin(std::string_view* bytes) {
        unsigned char tag;
        uint64_t length;
        if (!byte(&tag)) return false;
        if (tag < 0xc4 || tag > 0xc6) return spoil();
        return big_endian(size_t{1} << (tag - 0xc4), &length) && take(length, bytes);
    }
    bool str(std::string_view* text) {
        unsigned char tag;
        uint64_t length;
        if (!byte(&tag)) return false;
        if ((tag & 0xe0) == 0xa0) return take(tag & 0x1f, text);
        if (tag < 0xd9 || tag > 0xdb) return spoil();
        return big_endian(size_t{1} << (tag - 0xd9), &length) && take(length, text);
    }
    bool boolean(bool* value) {
        unsigned char tag;
        if (!byte(&tag)) return false;
        if (tag != 0xc2 && tag != 0xc3) return spoil();
        return *value = tag == 0xc3, true;
    }
    // Whatever comes next: fields that a later version has added. Nesting deeper than `depth` spoils the reader.
    bool skip(uint64_t items, int depth = 8) {
        for (; items > 0; --items)
            if (!skip_one(depth)) return false;
        return true;
    }
    bool at_end() const { return good_ && at_ == data_.size(); }
    // Bytes not read yet: no more items than this can follow, whatever a count says.
    size_t left() const { return data_.size() - at_; }

  private:
    bool take(uint64_t length, std::string_view* bytes) {
        if (length > data_.size() - at_) return spoil();
        *bytes = data_.substr(at_, length);
        at_ += length;
        return true;
    }
    bool advance(uint64_t bytes) {
        if (bytes > data_.size() - at_) return spoil();
        at_ += bytes;
        return true;
    }
    bool skip_sized(size_t length_bytes, uint64_t more) {
        uint64_t length;
        return big_endian(length_bytes, &length) && advance(length + more);
    }
    bool skip_items(uint64_t count, int depth) {
        if (depth == 0 || count > data_.size() - at_) return spoil();  // an item has a byte or more
        return skip(count, depth - 1);
    }
    bool skip_one(int depth) {
        unsigned char tag;
        uint64_t count;
        if (!byte(&tag)) return false;
        if (tag < 0x80 || tag >= 0xe0) return true;  // small integers
        if (tag < 0x90) return skip_items(2 * (tag & 0x0f), depth);
        if (tag < 0xa0) return skip_items(tag & 0x0f, depth);
        if (tag < 0xc0) return advance(tag & 0x1f);
        if (tag == 0xc0 || tag == 0xc2 || tag == 0xc3) return true;          // nil, booleans
        if (tag >= 0xc4 && tag <= 0xc6) return skip_sized(size_t{1} << (tag - 0xc4), 0);  // byte strings
        if (tag >= 0xc7 && tag <= 0xc9) return skip_sized(size_t{1} << (tag - 0xc7), 1);  // extensions
        if (tag == 0xca || tag == 0xcb) return advance(tag == 0xca ? 4 : 8);
        if (tag >= 0xcc && tag <= 0xcf) return advance(size_t{1} << (tag - 0xcc));
        if (tag >= 0xd0 && tag <= 0xd3) return advance(size_t{1} << (tag - 0xd0));
        if (tag >= 0xd4 && tag <= 0xd8) return advance(1 + (size_t{1} << (tag - 0xd4)));
        if (tag >= 0xd9 && tag <= 0xdb) return skip_sized(size_t{1} << (tag - 0xd9), 0);  // text
        if (tag == 0xdc || tag == 0xdd) return big_endian(tag == 0xdc ? 2 : 4, &count) && skip_items(count, depth);
        if (tag == 0xde || tag == 0xdf) return big_endian(tag == 0xde ? 2 : 4, &count) && skip_items(2 * count, depth);
        return spoil();
    }
    bool spoil() { return good_ = false; }
    bool byte(unsigned char* out) {
        if (!good_ || at_ >= data_.size()) return spoil();
        *out = static_cast<unsigned char>(data_[at_++]);
        return true;
    }
    bool big_endian(size_t bytes, uint64_t* out) {
        if (bytes > data_.size() - at_) return spoil();
        uint64_t value = 0;
        for (size_t i = 0; i < bytes; ++i) value = value << 8 | static_cast<unsigned char>(data_[at_++]);
        *out = value;
        return true;
    }

    std::string_view data_;
    size_t at_ = 0;
    bool good_ = true;
};

class Writer {
  public:
    explicit Writer(std::string* out) : out_(out) {}

    void array(uint32_t count) {
        if (count < 16) return put(static_cast<unsigned char>(0x90 | count));
        if (count < 65536) return put(0xdc), big_endian(2, count);
        put(0xdd), big_endian(4, count);
    }
    void uint(uint64_t value) {
        if (value < 0x80) return put(static_cast<unsigned char>(value));
        if (value < 0x100) return put(0xcc), big_endian(1, value);
        if (value < 0x10000) return put(0xcd), big_endian(2, value);
        if (value < 0x100000000) return put(0xce), big_endian(4, value);
        put(0xcf), big_endian(8, value);
    }
    void sint(int64_t value) {
        const auto bits = static_cast<uint64_t>(value);
        if (value >= 0) return uint(bits);
        if (value >= -0x20) return put(static_cast<unsigned char>(bits));
        if (value >= -0x80) return put(0xd0), big_endian(1, bits);
        if (value >= -0x8000) return put(0xd1), big_endian(2, bits);
        if (value >= -0x80000000LL) return put(0xd2), big_endian(4, bits);
        put(0xd3), big_endian(8, bits);
    }
    void real(double value) { put(0xcb), big_endian(8, std::bit_cast<uint64_t>(value)); }
    void nil() { put(0xc0); }
    void map(uint32_t count) {
        if (count < 16) return put(static_cast<unsigned char>(0x80 | count));
        if (count < 65536) return put(0xde), big_endian(2, count);
        put(0xdf), big_endian(4, count);
    }
    void bin(std::string_view bytes) {
        if (bytes.size() < 0x100) {
            put(0xc4), big_endian(1, bytes.size());
        } else if (bytes.size() < 0x10000) {
            put(0xc5), big_endian(2, bytes.size());
        } else {
            put(0xc6), big_endian(4, bytes.size());
        }
        out_->append(bytes);
    }
    void str(std::string_view text) {
        if (text.size() < 32) {
            put(static_cast<unsigned char>(0xa0 | text.size()));
        } else if (text.size() < 0x100) {
            put(0xd9), big_endian(1, text.size());
        } else if (text.size() < 0x10000) {
            put(0xda), big_endian(2, text.size());
        } else {
            put(0xdb), big_endian(4, text.size());
        }
        out_->append(text);
    }
    void boolean(bool value) { put(value ? 0xc3 : 0xc2); }

  private:
    void put(unsigned char byte) { out_->push_back(static_cast<char>(byte)); }
    void big_endian(size_t bytes, uint64_t value) {
        for (size_t i = bytes; i-- > 0;) put(static_cast<unsigned char>(value >> (8 * i)));
    }

    std::string* out_;
};

}  // namespace p2pkv::msgpack
