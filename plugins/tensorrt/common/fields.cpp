#include "fields.h"

#include <cmath>
#include <cstdio>
#include <cstring>

namespace razor::trt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace {

const char *type_name(PluginFieldType type) {
    switch (type) {
    case PluginFieldType::kFLOAT16: return "FLOAT16";
    case PluginFieldType::kFLOAT32: return "FLOAT32";
    case PluginFieldType::kFLOAT64: return "FLOAT64";
    case PluginFieldType::kINT8: return "INT8";
    case PluginFieldType::kINT16: return "INT16";
    case PluginFieldType::kINT32: return "INT32";
    case PluginFieldType::kINT64: return "INT64";
    case PluginFieldType::kCHAR: return "CHAR";
    default: return "another type";
    }
}

[[noreturn]] void refuse(const char *field, const std::string &expected, const std::string &found) {
    throw Refused("field " + std::string(field) + ": expected " + expected + ", found " + found);
}

std::string range(int64_t low, int64_t high) {
    if (low == high) return std::to_string(low);
    if (high >= INT32_MAX) return "an integer >= " + std::to_string(low);
    return "an integer in " + std::to_string(low) + ".." + std::to_string(high);
}

// Data of a field need not be aligned.
template <typename T> T element(const PluginField &field, int i) {
    T value;
    std::memcpy(&value, static_cast<const char *>(field.data) + sizeof(T) * i, sizeof(T));
    return value;
}

}  // namespace

FieldReader::FieldReader(const nvinfer1::PluginFieldCollection *fields) {
    if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
        throw Refused("fields: expected a collection, found none");
    }
    for (int i = 0; i < fields->nbFields; ++i) {
        const PluginField &field = fields->fields[i];
        if (field.name == nullptr) throw Refused("fields[" + std::to_string(i) + "]: expected a name, found none");
        if (has(field.name)) refuse(field.name, "one value", "the field twice");
        if (field.length < 0 || (field.length > 0 && field.data == nullptr)) {
            refuse(field.name, "data", std::to_string(field.length) + " elements without an address");
        }
        fields_.push_back(field);
    }
    used_.resize(fields_.size());
}

bool FieldReader::has(const char *name) const {
    for (const PluginField &field : fields_) {
        if (std::strcmp(field.name, name) == 0) return true;
    }
    return false;
}

const PluginField &FieldReader::take(const char *name) {
    known_.emplace_back(name);
    for (size_t i = 0; i < fields_.size(); ++i) {
        if (std::strcmp(fields_[i].name, name) == 0) {
            used_[i] = true;
            return fields_[i];
        }
    }
    throw Refused("field " + std::string(name) + ": missing");
}

std::vector<int64_t> FieldReader::values(const char *name, int64_t low, int64_t high) {
    const PluginField &field = take(name);
    std::vector<int64_t> values;
    // An empty list may have lost its type on the way.
    if (field.length == 0) return values;
    if (field.type != PluginFieldType::kINT32 && field.type != PluginFieldType::kINT64) {
        refuse(name, "type INT32 or INT64", type_name(field.type));
    }
    for (int i = 0; i < field.length; ++i) {
        values.push_back(field.type == PluginFieldType::kINT32 ? element<int32_t>(field, i)
                                                               : element<int64_t>(field, i));
        if (values[i] < low || values[i] > high) refuse(name, range(low, high), std::to_string(values[i]));
    }
    return values;
}

std::vector<int32_t> FieldReader::integers(const char *name, int32_t low, int32_t high) {
    const std::vector<int64_t> wide = values(name, low, high);
    return std::vector<int32_t>(wide.begin(), wide.end());
}

int64_t FieldReader::integer64(const char *name, int64_t low, int64_t high) {
    const std::vector<int64_t> found = values(name, low, high);
    if (found.size() != 1) refuse(name, "one integer", std::to_string(found.size()));
    return found[0];
}

int32_t FieldReader::integer(const char *name, int32_t low, int32_t high) {
    return static_cast<int32_t>(integer64(name, low, high));
}

float FieldReader::positive(const char *name) {
    const PluginField &field = take(name);
    if (field.type != PluginFieldType::kFLOAT32 && field.type != PluginFieldType::kFLOAT64) {
        refuse(name, "type FLOAT32 or FLOAT64", type_name(field.type));
    }
    if (field.length != 1) refuse(name, "one number", std::to_string(field.length));
    const float value = field.type == PluginFieldType::kFLOAT32 ? element<float>(field, 0)
                                                                 : static_cast<float>(element<double>(field, 0));
    if (!std::isfinite(value) || value <= 0) refuse(name, "a finite number > 0", std::to_string(value));
    return value;
}

void FieldReader::finish() const {
    for (size_t i = 0; i < fields_.size(); ++i) {
        if (used_[i]) continue;
        std::string names;
        for (const std::string &name : known_) names += (names.empty() ? "" : ", ") + name;
        throw Refused("field " + std::string(fields_[i].name) + ": unknown; known: " + names);
    }
}

const nvinfer1::PluginFieldCollection *FieldWriter::collection() {
    fields_.clear();
    for (const auto &[name, values] : integers_) {
        fields_.emplace_back(name, values.data(), PluginFieldType::kINT32, static_cast<int32_t>(values.size()));
    }
    for (const auto &[name, value] : wide_) fields_.emplace_back(name, &value, PluginFieldType::kINT64, 1);
    for (const auto &[name, value] : numbers_) fields_.emplace_back(name, &value, PluginFieldType::kFLOAT32, 1);
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
    return &collection_;
}

std::string FieldWriter::text() const {
    std::string out;
    for (const auto &[name, values] : integers_) {
        out += std::string(out.empty() ? "" : " ") + name + "=";
        for (size_t i = 0; i < values.size(); ++i) out += (i ? "," : "") + std::to_string(values[i]);
    }
    for (const auto &[name, value] : wide_) out += std::string(" ") + name + "=" + std::to_string(value);
    for (const auto &[name, value] : numbers_) {
        char digits[32];
        std::snprintf(digits, sizeof digits, "%.9g", static_cast<double>(value));
        out += std::string(" ") + name + "=" + digits;
    }
    return out;
}

}  // namespace razor::trt
