// Numbers and structs of the CUDA driver's interface, as far as the emulation needs them, so that
// it compiles without a CUDA toolkit. They are those of 64-bit systems, the same since CUDA 12.3.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

namespace {

enum Status : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CONTEXT_IS_DESTROYED = 709,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_MERGE = 902,
    STREAM_CAPTURE_UNMATCHED = 903,
    STREAM_CAPTURE_UNJOINED = 904,
    STREAM_CAPTURE_ISOLATION = 905,
    STREAM_CAPTURE_WRONG_THREAD = 908,
    CAPTURED_EVENT = 907,
};

const std::map<int, std::pair<const char*, const char*>> ERRORS = {
    {0, {"CUDA_SUCCESS", "no error"}},
    {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {3, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {34, {"CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"}},
    {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {200, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {209,
     {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {600, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {700, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {709, {"CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"}},
    {719, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {801, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {803,
     {"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
      "system has unsupported display driver / cuda driver combination"}},
    {900,
     {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
    {901,
     {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
      "operation failed due to a previous error during capture"}},
    {902,
     {"CUDA_ERROR_STREAM_CAPTURE_MERGE",
      "operation would result in a merge of separate capture sequences"}},
    {903,
     {"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
      "capture was not ended in the same stream as it began"}},
    {904, {"CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"}},
    {905,
     {"CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
      "dependency created on uncaptured work in another stream"}},
    {907,
     {"CUDA_ERROR_CAPTURED_EVENT",
      "operation not permitted on an event last recorded in a capturing stream"}},
    {908,
     {"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
      "attempt to terminate a thread-local capture sequence from another thread"}},
    {999, {"CUDA_ERROR_UNKNOWN", "unknown error"}},
};

enum {
    NODE_KERNEL = 0,
    NODE_MEMCPY = 1,
    NODE_MEMSET = 2,
    NODE_GRAPH = 4,
    NODE_EMPTY = 5,
    NODE_CONDITIONAL = 13
};
enum { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };

struct KernelNodeParams {  // CUDA_KERNEL_NODE_PARAMS_v2
    void* func;
    unsigned grid[3], block[3], shared_bytes;
    void** params;
    void** extra;
    void* kern;
    void* context;
};
struct Memcpy3D {  // CUDA_MEMCPY3D
    struct Side {
        size_t x, y, z, lod;
        unsigned type;
        void* host;
        uint64_t device;
        void *array, *reserved;
        size_t pitch, height;
    } source, target;
    size_t width, height, depth;
};
struct MemsetNodeParams {  // CUDA_MEMSET_NODE_PARAMS
    uint64_t target;
    size_t pitch;
    unsigned value, element_bytes;
    size_t width, height;
};
struct LaunchConfig {  // CUlaunchConfig
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    void* attributes;
    unsigned n_attributes;
};
struct ConditionalNodeParams {  // CUDA_CONDITIONAL_NODE_PARAMS
    uint64_t handle;
    unsigned type, size;
    void** graphs;
    void* context;
};
struct NodeParams {  // CUgraphNodeParams
    int type, reserved[3];
    union {
        long long padding[29];
        ConditionalNodeParams conditional;
    };
    long long reserved2;
};
struct InstantiateParams {  // CUDA_GRAPH_INSTANTIATE_PARAMS
    uint64_t flags;
    void* upload_stream;
    void* error_node;
    int result;
};
static_assert(sizeof(KernelNodeParams) == 72 && sizeof(Memcpy3D) == 200, "ABI");
static_assert(sizeof(LaunchConfig) == 56 && sizeof(MemsetNodeParams) == 40, "ABI");
static_assert(sizeof(NodeParams) == 256 && sizeof(InstantiateParams) == 32, "ABI");

}  // namespace
