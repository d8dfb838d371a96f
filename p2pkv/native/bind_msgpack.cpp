// Python bindings of MessagePack, for the engine's client: importing msgspec would cost an engine more than all of ours.
#include <nanobind/nanobind.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.hpp"
#include "msgpack.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace p2pkv;

namespace {

constexpr int kDepthMax = 16;  // of what is packed; no message is nested deeper than 4, and a list may contain itself

constexpr size_t kReserveBytes = 4096;  // a request for 100 blocks, without growing in between

nb::object own(PyObject* made) {
    if (!made) throw nb::python_error();
    return nb::steal(made);
}

uint32_t fit(Py_ssize_t count) {
    if (static_cast<size_t>(count) > std::numeric_limits<uint32_t>::max())
        throw nb::value_error("pack: longer than MessagePack can say");
    return static_cast<uint32_t>(count);
}

std::string_view view(const char* bytes, Py_ssize_t length) { return {bytes, fit(length)}; }

void pack_int(msgpack::Writer& out, PyObject* value) {
    int overflow;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow == 0) return out.sint(number);
    const unsigned long long large = PyLong_AsUnsignedLongLong(value);  // refuses what is negative, too
    if (PyErr_Occurred()) throw nb::python_error();
    out.uint(large);
}

void pack_str(msgpack::Writer& out, PyObject* value) {
    Py_ssize_t length;
    const char* text = PyUnicode_AsUTF8AndSize(value, &length);
    if (!text) throw nb::python_error();
    out.str(view(text, length));
}

// Runs no code but CPython's own, so that nothing that is walked through here changes meanwhile.
void pack_value(msgpack::Writer& out, PyObject* value, int depth) {
    if (PyBytes_Check(value)) return out.bin(view(PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value)));
    if (PyBool_Check(value)) return out.boolean(value == Py_True);  // before int, which it is, too
    if (PyLong_Check(value)) return pack_int(out, value);
    if (PyUnicode_Check(value)) return pack_str(out, value);
    if (value == Py_None) return out.nil();
    if (PyFloat_Check(value)) return out.real(PyFloat_AS_DOUBLE(value));
    if (PyByteArray_Check(value)) return out.bin(view(PyByteArray_AS_STRING(value), PyByteArray_GET_SIZE(value)));
    if (PyMemoryView_Check(value)) {
        const Buffer buffer(value, false);
        return out.bin(view(static_cast<const char*>(buffer.data()), static_cast<Py_ssize_t>(buffer.size())));
    }
    if (depth == 0) throw nb::value_error("pack: nested too deep");
    if (PyList_Check(value) || PyTuple_Check(value)) {
        const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
        PyObject** items = PySequence_Fast_ITEMS(value);
        out.array(fit(count));
        for (Py_ssize_t i = 0; i < count; ++i) pack_value(out, items[i], depth - 1);
        return;
    }
    if (PyDict_Check(value)) {
        out.map(fit(PyDict_GET_SIZE(value)));
        PyObject *key, *item;
        for (Py_ssize_t at = 0; PyDict_Next(value, &at, &key, &item);) {
            pack_value(out, key, depth - 1);
            pack_value(out, item, depth - 1);
        }
        return;
    }
    throw nb::type_error((std::string("pack: cannot be said in MessagePack: ") + Py_TYPE(value)->tp_name).c_str());
}

nb::bytes pack(nb::handle value) {
    std::string out;
    out.reserve(kReserveBytes);
    msgpack::Writer writer(&out);
    pack_value(writer, value.ptr(), kDepthMax);
    return nb::bytes(out.data(), out.size());
}

// What a value must be. It is checked while it is read, so that nothing is ever made of input that is not that.
class Shape {
  public:
    enum class Kind { kUint, kBoolean, kText, kBinary, kArray, kRecord };

    Shape(Kind kind, uint64_t most) : kind_(kind), most_(most) {}

    static Shape array(const Shape& items, uint64_t most) {
        Shape shape(Kind::kArray, most);
        shape.parts_.push_back(items);
        return shape;
    }
    static Shape record(nb::type_object type, const nb::sequence& fields, nb::tuple defaults) {
        Shape shape(Kind::kRecord, 0);
        if (!PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type.ptr()), &PyTuple_Type))
            throw nb::type_error("record: not a type of tuple");
        for (nb::handle field : fields) shape.parts_.push_back(nb::cast<const Shape&>(field));
        if (defaults.size() > shape.parts_.size()) throw nb::value_error("record: more defaults than fields");
        shape.required_ = shape.parts_.size() - defaults.size();
        shape.type_ = std::move(type);
        shape.defaults_ = std::move(defaults);
        return shape;
    }

    nb::object unpack(nb::bytes data) const {
        msgpack::Reader in({data.c_str(), data.size()});
        nb::object value = read(in);
        if (!in.at_end()) throw nb::value_error("bytes follow the value");
        return value;
    }

  private:
    nb::object read(msgpack::Reader& in) const {
        switch (kind_) {
            case Kind::kUint: return read_uint(in);
            case Kind::kBoolean: return read_boolean(in);
            case Kind::kText: return read_text(in);
            case Kind::kBinary: return read_binary(in);
            case Kind::kArray: return read_array(in);
            case Kind::kRecord: return read_record(in);
        }
        throw std::logic_error("a shape of no kind");
    }
    nb::object read_uint(msgpack::Reader& in) const {
        uint64_t value;
        if (!in.uint(&value) || value > most_) throw expected("an integer of 0");
        return own(PyLong_FromUnsignedLongLong(value));
    }
    nb::object read_boolean(msgpack::Reader& in) const {
        bool value;
        if (!in.boolean(&value)) throw nb::value_error("expected a boolean");
        return nb::bool_(value);
    }
    nb::object read_text(msgpack::Reader& in) const {
        std::string_view text;
        if (!in.str(&text)) throw expected("text of 0");
        nb::object value = own(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), nullptr));
        if (static_cast<uint64_t>(PyUnicode_GET_LENGTH(value.ptr())) > most_) throw expected("text of 0");
        return value;
    }
    nb::object read_binary(msgpack::Reader& in) const {
        std::string_view bytes;
        if (!in.bin(&bytes) || bytes.size() > most_) throw expected("bytes, 0");
        return nb::bytes(bytes.data(), bytes.size());
    }
    nb::object read_array(msgpack::Reader& in) const {
        uint64_t count;
        if (!in.array(&count) || count > most_) throw expected("an array of 0");
        if (count > in.left()) throw nb::value_error("an array is cut off");  // before anything is made for it
        nb::object values = own(PyTuple_New(static_cast<Py_ssize_t>(count)));
        for (uint64_t i = 0; i < count; ++i) PyTuple_SET_ITEM(values.ptr(), i, parts_[0].read(in).release().ptr());
        return values;
    }
    nb::object read_record(msgpack::Reader& in) const {
        uint64_t count;
        if (!in.array(&count) || count < required_)
            throw nb::value_error(("expected an array of " + std::to_string(required_) + " fields or more").c_str());
        nb::object values = own(PyTuple_New(static_cast<Py_ssize_t>(parts_.size())));
        for (size_t i = 0; i < parts_.size(); ++i) {
            nb::object value = i < count ? parts_[i].read(in) : nb::borrow(defaults_[i - required_]);
            PyTuple_SET_ITEM(values.ptr(), i, value.release().ptr());
        }
        if (count > parts_.size() && !in.skip(count - parts_.size())) throw nb::value_error("a later field is malformed");
        if (type_.ptr() == reinterpret_cast<PyObject*>(&PyTuple_Type)) return values;
        // As tuple.__new__(type, values), which is what a NamedTuple's _make does.
        const nb::object arguments = own(PyTuple_Pack(1, values.ptr()));
        return own(PyTuple_Type.tp_new(reinterpret_cast<PyTypeObject*>(type_.ptr()), arguments.ptr(), nullptr));
    }
    nb::builtin_exception expected(const char* what) const {
        return nb::value_error((std::string("expected ") + what + " to " + std::to_string(most_)).c_str());
    }

    Kind kind_;
    uint64_t most_;
    std::vector<Shape> parts_;  // the items' (one), or the fields'
    size_t required_ = 0;
    nb::object type_;
    nb::tuple defaults_;
};

}  // namespace

void bind_msgpack(nb::module_& m) {
    m.def("pack", pack, "value"_a.none());
    nb::class_<Shape>(m, "Shape")
        .def_static("uint", [](uint64_t most) { return Shape(Shape::Kind::kUint, most); }, "most"_a)
        .def_static("boolean", [] { return Shape(Shape::Kind::kBoolean, 1); })
        .def_static("text", [](uint64_t most) { return Shape(Shape::Kind::kText, most); }, "chars_max"_a)
        .def_static("binary", [](uint64_t most) { return Shape(Shape::Kind::kBinary, most); }, "bytes_max"_a)
        .def_static("array", &Shape::array, "items"_a, "items_max"_a)
        .def_static("record", &Shape::record, "type"_a, "fields"_a,
                    "defaults"_a = nb::tuple())
        .def("unpack", &Shape::unpack, "data"_a);
}
