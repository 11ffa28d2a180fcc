// A stand-in for TensorRT's header: just the classes that a plugin of the third generation meets, with their names and
// signatures, so that tests can compile and drive the plugins on machines without TensorRT. It makes no library that
// TensorRT could load. With TENSORRT_ROOT set, the same tests compile against the real headers.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "NvInferVersion.h"

namespace nvinfer1 {

// Values -------------------------------------------------------------------------------------------
using AsciiChar = char;

enum class DataType : int32_t {
    kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5, kFP8 = 6, kBF16 = 7, kINT64 = 8, kINT4 = 9
};
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1, kHWC8 = 2 };
enum class DimensionOperation : int32_t { kSUM = 0, kPROD = 1, kMAX = 2, kMIN = 3, kSUB = 4 };
enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };
enum class PluginFieldType : int32_t {
    kFLOAT16 = 0, kFLOAT32 = 1, kFLOAT64 = 2, kINT8 = 3, kINT16 = 4, kINT32 = 5, kCHAR = 6, kDIMS = 7, kUNKNOWN = 8,
    kBF16 = 9, kINT64 = 10, kFP8 = 11, kINT4 = 12
};

struct Dims {
    static constexpr int32_t MAX_DIMS{8};
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};

struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min, max, opt;
};

class PluginField {
public:
    const char *name;
    const void *data;
    PluginFieldType type;
    int32_t length;
    PluginField(const char *name_ = nullptr, const void *data_ = nullptr,
                PluginFieldType type_ = PluginFieldType::kUNKNOWN, int32_t length_ = 0) noexcept
        : name(name_), data(data_), type(type_), length(length_) {}
};

struct PluginFieldCollection {
    int32_t nbFields;
    const PluginField *fields;
};

// What TensorRT gives to plugins -------------------------------------------------------------------
struct InterfaceInfo {
    const char *kind;
    int32_t major, minor;
};

class IVersionedInterface {
public:
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~IVersionedInterface() noexcept = default;
};

class INoCopy {
protected:
    INoCopy() = default;
    virtual ~INoCopy() = default;
    INoCopy(const INoCopy &) = delete;
    INoCopy &operator=(const INoCopy &) = delete;
};

class IDimensionExpr;

namespace apiv {
class VRoot {
public:
    virtual ~VRoot() noexcept = default;
};
class VDimensionExpr : public VRoot {
public:
    virtual bool isConstant() const = 0;
    virtual int64_t getConstantValue() const = 0;
    virtual bool isSizeTensor() const = 0;
};
class VExprBuilder : public VRoot {
public:
    virtual const IDimensionExpr *constant(int64_t value) = 0;
    virtual const IDimensionExpr *operation(DimensionOperation op, const IDimensionExpr &first,
                                            const IDimensionExpr &second) = 0;
    virtual const IDimensionExpr *declareSizeTensor(int32_t output, const IDimensionExpr &opt,
                                                    const IDimensionExpr &upper) = 0;
};
}  // namespace apiv

class IDimensionExpr : public INoCopy {
public:
    bool isConstant() const noexcept { return mImpl->isConstant(); }
    int64_t getConstantValue() const noexcept { return mImpl->getConstantValue(); }

protected:
    apiv::VDimensionExpr *mImpl;
};

class IExprBuilder : public INoCopy {
public:
    const IDimensionExpr *constant(int64_t value) noexcept { return mImpl->constant(value); }
    const IDimensionExpr *operation(DimensionOperation op, const IDimensionExpr &first,
                                    const IDimensionExpr &second) noexcept {
        return mImpl->operation(op, first, second);
    }

protected:
    apiv::VExprBuilder *mImpl;
};

struct DimsExprs {
    int32_t nbDims;
    const IDimensionExpr *d[Dims::MAX_DIMS];
};

class IGpuAllocator;
class IErrorRecorder;

class IPluginResourceContext {
public:
    virtual IGpuAllocator *getGpuAllocator() const noexcept = 0;
    virtual IErrorRecorder *getErrorRecorder() const noexcept = 0;
    virtual ~IPluginResourceContext() noexcept = default;
};

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const char *text) noexcept = 0;
    virtual ~ILogger() = default;
};

class ILoggerFinder {
public:
    virtual ILogger *findLogger() = 0;

protected:
    virtual ~ILoggerFinder() = default;
};

// What a plugin is ---------------------------------------------------------------------------------
class IPluginCapability : public IVersionedInterface {};

class IPluginV3 : public IVersionedInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
    virtual IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
    virtual IPluginV3 *clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
    virtual const char *getPluginName() const noexcept = 0;
    virtual const char *getPluginVersion() const noexcept = 0;
    virtual const char *getPluginNamespace() const noexcept = 0;
};

namespace v_1_0 {
class IPluginV3OneBuild : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
    virtual int32_t configurePlugin(const DynamicPluginTensorDesc *in, int32_t nbInputs,
                                    const DynamicPluginTensorDesc *out, int32_t nbOutputs) noexcept = 0;
    virtual int32_t getOutputDataTypes(DataType *outputs, int32_t nbOutputs, const DataType *inputs,
                                       int32_t nbInputs) const noexcept = 0;
    virtual int32_t getOutputShapes(const DimsExprs *inputs, int32_t nbInputs, const DimsExprs *shapeInputs,
                                    int32_t nbShapeInputs, DimsExprs *outputs, int32_t nbOutputs,
                                    IExprBuilder &builder) noexcept = 0;
    virtual bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc *inOut, int32_t nbInputs,
                                           int32_t nbOutputs) noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual size_t getWorkspaceSize(const DynamicPluginTensorDesc *, int32_t, const DynamicPluginTensorDesc *,
                                    int32_t) const noexcept {
        return 0;
    }
    virtual const char *getTimingCacheID() noexcept { return nullptr; }
    virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
    virtual const char *getMetadataString() noexcept { return nullptr; }
};
}  // namespace v_1_0

namespace v_2_0 {
class IPluginV3OneBuild : public v_1_0::IPluginV3OneBuild {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 2, 0}; }
    virtual int32_t getAliasedInput(int32_t) noexcept { return -1; }
};
}  // namespace v_2_0

using IPluginV3OneBuild = v_1_0::IPluginV3OneBuild;
using IPluginV3OneBuildV2 = v_2_0::IPluginV3OneBuild;

class IPluginV3OneRuntime : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
    virtual int32_t onShapeChange(const PluginTensorDesc *in, int32_t nbInputs, const PluginTensorDesc *out,
                                  int32_t nbOutputs) noexcept = 0;
    virtual int32_t enqueue(const PluginTensorDesc *inputDesc, const PluginTensorDesc *outputDesc,
                            const void *const *inputs, void *const *outputs, void *workspace,
                            cudaStream_t stream) noexcept = 0;
    virtual IPluginV3 *attachToContext(IPluginResourceContext *context) noexcept = 0;
    virtual const PluginFieldCollection *getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginCreatorV3One : public IPluginCreatorInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
    virtual IPluginV3 *createPlugin(const char *name, const PluginFieldCollection *fc,
                                    TensorRTPhase phase) noexcept = 0;
    virtual const PluginFieldCollection *getFieldNames() noexcept = 0;
    virtual const char *getPluginName() const noexcept = 0;
    virtual const char *getPluginVersion() const noexcept = 0;
    virtual const char *getPluginNamespace() const noexcept = 0;
};

// Only what a library that registers itself calls.
class IPluginRegistry {
public:
    virtual bool registerCreator(IPluginCreatorInterface &creator, const char *pluginNamespace) noexcept = 0;

protected:
    virtual ~IPluginRegistry() noexcept = default;
};

}  // namespace nvinfer1

extern "C" nvinfer1::IPluginRegistry *getPluginRegistry() noexcept;
extern "C" nvinfer1::ILogger *getLogger() noexcept;
extern "C" void *createInferRuntime_INTERNAL(void *logger, int32_t version) noexcept;
extern "C" int32_t getInferLibVersion() noexcept;
