// Fields of a plugin: read with checks at creation, written into the plan.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace razor::trt {

// Why something is refused, as one line: what, where, expected, found, what to do.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Reads the fields that a plugin is created from. Each is asked for once; finish() refuses what is left over.
// Everything throws Refused.
class FieldReader {
public:
    explicit FieldReader(const nvinfer1::PluginFieldCollection *fields);

    bool has(const char *name) const;
    // One integer in [low, high]; INT32 or INT64.
    int64_t integer64(const char *name, int64_t low, int64_t high);
    int32_t integer(const char *name, int32_t low, int32_t high);
    std::vector<int32_t> integers(const char *name, int32_t low, int32_t high);
    // One finite number > 0; FLOAT32 or FLOAT64.
    float positive(const char *name);
    void finish() const;

private:
    const nvinfer1::PluginField &take(const char *name);
    std::vector<int64_t> values(const char *name, int64_t low, int64_t high);

    std::vector<nvinfer1::PluginField> fields_;
    std::vector<bool> used_;
    std::vector<std::string> known_; // asked for
};

// Fields that go into the plan. Owns its data; a copy is independent.
class FieldWriter {
public:
    void integer(const char *name, int32_t value) { integers(name, {value}); }
    // Not empty: TensorRT need not carry a field without data.
    void integers(const char *name, std::vector<int32_t> values) { integers_.emplace_back(name, std::move(values)); }
    void integer64(const char *name, int64_t value) { wide_.emplace_back(name, value); }
    void number(const char *name, float value) { numbers_.emplace_back(name, value); }

    // Valid until the next call or the end of this object.
    const nvinfer1::PluginFieldCollection *collection();
    // "num_heads=8 num_kv_heads=2 …": tells two sets of fields apart.
    std::string text() const;

private:
    std::vector<std::pair<const char *, std::vector<int32_t>>> integers_;
    std::vector<std::pair<const char *, int64_t>> wide_;
    std::vector<std::pair<const char *, float>> numbers_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace razor::trt
