// A CUDA driver without a GPU, for tests only: the entry points of libcuda.so.1 that cuda-core,
// pycuda and our own code call, on the CPU.
//
// "Device" memory is host memory. Work is done when it is put on a stream, in order, except while
// the stream is captured. Kernels are found in the cubin that the real compiler made, with the
// sizes of their parameters; what they do is host code that was registered under their name. It
// refuses what CUDA refuses where that is cheap to know, and says nothing of speed, of races
// between streams, or of what a real driver does beyond its documentation.
//
// A graph runs its nodes in the least convenient order that its dependencies allow, so that a
// dependency that was forgotten shows.

#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// ---------------------------------------------------------------------------------------------
// For tests.

EXPORT int emulated_marker() {
    return 1;
}

// What runs when a kernel of this name is launched; `setter` as `host_on_conditional`, or null.
EXPORT void emulated_register_kernel(const char* name, HostKernel code,
                                     SetConditionalHandler setter) {
    std::lock_guard<std::recursive_mutex> lock(driver().mutex);
    driver().kernels[name] = code;
    if (setter) driver().setters.insert(setter);
}

// Forget what is alive, and go back to one device, the log and faults empty.
EXPORT void emulated_reset() {
    std::lock_guard<std::recursive_mutex> lock(driver().mutex);
    Driver& d = driver();
    ++d.epoch;
    d.initialized = false;
    d.version = 13000;
    d.devices = 1;
    d.integrated = false;
    d.faults.clear();
    d.log.clear();
    d.problems.clear();
    for (auto at = d.memory.begin(); at != d.memory.end();) {
        if (at->second.alive) {
            ++at;
        } else {
            std::free(reinterpret_cast<void*>(at->first));
            at = d.memory.erase(at);
        }
    }
    for (Capture* capture : std::set<Capture*>(d.captures)) abandon(capture);
    context_stack.clear();
}

// Let the nth call of a function from now on ("*": of any) fail with a status.
EXPORT void emulated_fail(const char* function, long nth, int status) {
    std::lock_guard<std::recursive_mutex> lock(driver().mutex);
    driver().faults.push_back({function, nth, status});
}
EXPORT int emulated_faults_left() {
    return static_cast<int>(driver().faults.size());
}
EXPORT void emulated_forget_faults() {
    driver().faults.clear();
}

EXPORT void emulated_set_driver_version(int version) {
    driver().version = version;
}
EXPORT void emulated_set_device_count(int count) {
    driver().devices = count;
}
EXPORT void emulated_set_integrated(int integrated) {
    driver().integrated = integrated;
}

EXPORT size_t emulated_live_bytes() {
    std::lock_guard<std::recursive_mutex> lock(driver().mutex);
    size_t bytes = 0;
    for (const auto& [address, allocation] : driver().memory) {
        if (allocation.alive && allocation.epoch == driver().epoch) bytes += allocation.bytes;
    }
    return bytes;
}

namespace {
const char* joined(const std::vector<std::string>& lines) {
    static thread_local std::string text;
    text.clear();
    for (const std::string& line : lines) text += line + "\n";
    return text.c_str();
}
}  // namespace

// Kinds of the objects that were made since the last reset and not destroyed, one a line.
EXPORT const char* emulated_live_objects() {
    std::lock_guard<std::recursive_mutex> lock(driver().mutex);
    static const std::set<std::string> owned = {
        "context", "stream", "event", "library", "graph", "executable graph", "user object"};
    std::vector<std::string> kinds;
    for (const Object* object : driver().objects) {
        if (object->alive && object->epoch == driver().epoch && owned.count(object->kind)) {
            kinds.push_back(object->kind);
        }
    }
    return joined(kinds);
}
EXPORT int emulated_primary_references(int device) {
    return primary_context(device)->references;
}
// Names of the functions that were called, one a line.
EXPORT const char* emulated_log() {
    std::lock_guard<std::recursive_mutex> lock(driver().mutex);
    return joined(driver().log);
}
EXPORT void emulated_clear_log() {
    std::lock_guard<std::recursive_mutex> lock(driver().mutex);
    driver().log.clear();
}
// What no caller may do though the driver does not notice it, one a line.
EXPORT const char* emulated_problems() {
    std::lock_guard<std::recursive_mutex> lock(driver().mutex);
    check_freed_memory();
    return joined(driver().problems);
}

// ---------------------------------------------------------------------------------------------
// The driver's entry points: devices and contexts.

EXPORT int cuGetErrorName(int status, const char** name) {
    const auto found = ERRORS.find(status);
    *name = found == ERRORS.end() ? nullptr : found->second.first;
    return *name ? SUCCESS : INVALID_VALUE;
}

EXPORT int cuGetErrorString(int status, const char** text) {
    const auto found = ERRORS.find(status);
    *text = found == ERRORS.end() ? nullptr : found->second.second;
    return *text ? SUCCESS : INVALID_VALUE;
}

EXPORT int cuInit(unsigned flags) {
    BEGIN("cuInit")
    CHECK(flags == 0, INVALID_VALUE)
    CHECK(driver().devices, NO_DEVICE)
    driver().initialized = true;
    return SUCCESS;
}

EXPORT int cuDriverGetVersion(int* version) {
    BEGIN("cuDriverGetVersion")
    *version = driver().version;
    return SUCCESS;
}

EXPORT int cuDeviceGetCount(int* count) {
    BEGIN("cuDeviceGetCount")
    CHECK(driver().initialized, NOT_INITIALIZED)
    *count = driver().devices;
    return SUCCESS;
}

#define NEEDS_DEVICE(device)                     \
    CHECK(driver().initialized, NOT_INITIALIZED) \
    CHECK(device >= 0 && device < driver().devices, INVALID_DEVICE)

EXPORT int cuDeviceGet(int* device, int index) {
    BEGIN("cuDeviceGet")
    NEEDS_DEVICE(index)
    *device = index;
    return SUCCESS;
}

EXPORT int cuDeviceGetName(char* name, int bytes, int device) {
    BEGIN("cuDeviceGetName")
    NEEDS_DEVICE(device)
    std::snprintf(name, bytes, "Emulated GPU");
    return SUCCESS;
}

EXPORT int cuDeviceGetUuid_v2(char* uuid, int device) {
    BEGIN("cuDeviceGetUuid")
    NEEDS_DEVICE(device)
    std::memset(uuid, device + 1, 16);
    return SUCCESS;
}

EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    BEGIN("cuDeviceTotalMem")
    NEEDS_DEVICE(device)
    *bytes = size_t{8} << 30;
    return SUCCESS;
}

EXPORT int cuDeviceComputeCapability(int* major, int* minor, int device) {
    BEGIN("cuDeviceComputeCapability")
    NEEDS_DEVICE(device)
    *major = COMPUTE_CAPABILITY / 10;
    *minor = COMPUTE_CAPABILITY % 10;
    return SUCCESS;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
    BEGIN("cuDeviceGetAttribute")
    NEEDS_DEVICE(device)
    const std::map<int, int> values = {
        {1, 1024},                  // MAX_THREADS_PER_BLOCK
        {10, 32},                   // WARP_SIZE
        {16, 8},                    // MULTIPROCESSOR_COUNT
        {18, driver().integrated},  // INTEGRATED
        {19, 1},                    // CAN_MAP_HOST_MEMORY
        {41, 1},                    // UNIFIED_ADDRESSING
        {75, COMPUTE_CAPABILITY / 10},
        {76, COMPUTE_CAPABILITY % 10},
    };
    const auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRetain(void** out, int device) {
    BEGIN("cuDevicePrimaryCtxRetain")
    NEEDS_DEVICE(device)
    Context* context = primary_context(device);
    ++context->references;
    context->alive = true;
    *out = static_cast<Object*>(context);
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    Call call("cuDevicePrimaryCtxRelease");
    NEEDS_DEVICE(device)
    Context* context = primary_context(device);
    CHECK(context->references > 0, INVALID_CONTEXT)
    if (--context->references == 0) context->alive = false;
    return call.status;
}

EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    BEGIN("cuDevicePrimaryCtxGetState")
    NEEDS_DEVICE(device)
    *flags = 0;
    *active = primary_context(device)->references > 0;
    return SUCCESS;
}

namespace {
Status create_context(void** out, int device) {
    NEEDS_DEVICE(device)
    auto* context = new Context(device, false);
    context_stack.push_back(context);
    *out = static_cast<Object*>(context);
    return SUCCESS;
}
}  // namespace

EXPORT int cuCtxCreate_v2(void** context, unsigned, int device) {
    BEGIN("cuCtxCreate")
    return create_context(context, device);
}
EXPORT int cuCtxCreate_v4(void** context, void*, unsigned, int device) {
    BEGIN("cuCtxCreate")
    return create_context(context, device);
}

EXPORT int cuCtxDestroy_v2(void* handle) {
    Call call("cuCtxDestroy");
    auto* context = find<Context>(handle);
    CHECK(context, INVALID_CONTEXT)
    context->alive = false;
    if (current_context() == context) context_stack.pop_back();
    return call.status;
}

EXPORT int cuCtxPushCurrent_v2(void* handle) {
    BEGIN("cuCtxPushCurrent")
    auto* context = find<Context>(handle);
    CHECK(context, INVALID_CONTEXT)
    context_stack.push_back(context);
    return SUCCESS;
}

EXPORT int cuCtxPopCurrent_v2(void** handle) {
    Call call("cuCtxPopCurrent");
    CHECK(current_context(), INVALID_CONTEXT)
    if (handle) *handle = static_cast<Object*>(current_context());
    context_stack.pop_back();
    return call.status;
}

EXPORT int cuCtxSetCurrent(void* handle) {
    BEGIN("cuCtxSetCurrent")
    auto* context = find<Context>(handle);
    CHECK(context || !handle, INVALID_CONTEXT)
    if (!context_stack.empty()) context_stack.pop_back();
    if (context) context_stack.push_back(context);
    return SUCCESS;
}

EXPORT int cuCtxGetCurrent(void** handle) {
    BEGIN("cuCtxGetCurrent")
    CHECK(driver().initialized, NOT_INITIALIZED)
    *handle = current_context() ? static_cast<Object*>(current_context()) : nullptr;
    return SUCCESS;
}

EXPORT int cuCtxGetDevice(int* device) {
    BEGIN("cuCtxGetDevice")
    NEEDS_CONTEXT
    *device = context->device;
    return SUCCESS;
}

EXPORT int cuCtxGetApiVersion(void*, unsigned* version) {
    BEGIN("cuCtxGetApiVersion")
    *version = 3020;
    return SUCCESS;
}

EXPORT int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    BEGIN("cuCtxGetStreamPriorityRange")
    NEEDS_CONTEXT
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}

EXPORT int cuCtxSynchronize() {
    BEGIN("cuCtxSynchronize")
    NEEDS_CONTEXT
    return check_not_capturing();
}

// ---------------------------------------------------------------------------------------------
// Memory.

EXPORT int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    BEGIN("cuMemAlloc")
    NEEDS_CONTEXT
    CHECKED(check_not_capturing())
    return allocate(reinterpret_cast<void**>(address), bytes, false);
}

EXPORT int cuMemFree_v2(uint64_t address) {
    Call call("cuMemFree");
    NEEDS_CONTEXT
    CHECKED(check_not_capturing())
    CHECKED(release(address, false))
    return call.status;
}

EXPORT int cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    BEGIN("cuMemHostAlloc")
    NEEDS_CONTEXT
    CHECKED(check_not_capturing())
    CHECK(flags < 8, INVALID_VALUE)
    return allocate(pointer, bytes, true);
}

EXPORT int cuMemFreeHost(void* pointer) {
    Call call("cuMemFreeHost");
    NEEDS_CONTEXT
    CHECKED(check_not_capturing())
    CHECKED(release(reinterpret_cast<uintptr_t>(pointer), true))
    return call.status;
}

EXPORT int cuMemHostGetDevicePointer_v2(uint64_t* address, void* pointer, unsigned flags) {
    BEGIN("cuMemHostGetDevicePointer")
    NEEDS_CONTEXT
    CHECK(flags == 0, INVALID_VALUE)
    const auto* found = allocation_of(reinterpret_cast<uintptr_t>(pointer));
    CHECK(found && found->second.alive && found->second.host, INVALID_VALUE)
    *address = reinterpret_cast<uintptr_t>(pointer);  // one address space, as CUDA promises
    return SUCCESS;
}

EXPORT int cuPointerGetAttribute(void* data, int attribute, uint64_t address) {
    BEGIN("cuPointerGetAttribute")
    NEEDS_CONTEXT
    const auto* found = allocation_of(address);
    CHECK(found && found->second.alive && attribute == 2, INVALID_VALUE)
    *static_cast<unsigned*>(data) = found->second.host ? 1 : 2;
    return SUCCESS;
}

EXPORT int cuMemGetInfo_v2(size_t* available, size_t* total) {
    BEGIN("cuMemGetInfo")
    NEEDS_CONTEXT
    *available = size_t{6} << 30;
    *total = size_t{8} << 30;
    return SUCCESS;
}

EXPORT int cuMemsetD8_v2(uint64_t address, unsigned char value, size_t count) {
    BEGIN("cuMemsetD8")
    NEEDS_CONTEXT
    CHECKED(check_not_capturing())
    return run_set(address, value, 1, count);
}

EXPORT int cuMemsetD8Async(uint64_t address, unsigned char value, size_t count, void* stream) {
    BEGIN("cuMemsetD8Async")
    NEEDS_CONTEXT
    return enqueue(stream, set_work(address, value, 1, count));
}

EXPORT int cuMemsetD32Async(uint64_t address, unsigned value, size_t count, void* stream) {
    BEGIN("cuMemsetD32Async")
    NEEDS_CONTEXT
    return enqueue(stream, set_work(address, value, 4, count));
}

EXPORT int cuMemcpyAsync(uint64_t target, uint64_t source, size_t bytes, void* stream) {
    BEGIN("cuMemcpyAsync")
    NEEDS_CONTEXT
    return enqueue(stream, copy_work(target, source, bytes));
}

EXPORT int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, void* stream) {
    BEGIN("cuMemcpyDtoDAsync")
    NEEDS_CONTEXT
    return enqueue(stream, copy_work(target, source, bytes));
}

// ---------------------------------------------------------------------------------------------
// Streams, events and captures.

EXPORT int cuStreamCreateWithPriority(void** out, unsigned flags, int priority) {
    BEGIN("cuStreamCreateWithPriority")
    NEEDS_CONTEXT
    CHECK(flags <= 1, INVALID_VALUE)
    auto* stream = new Stream;
    stream->context = context;
    stream->flags = flags;
    stream->priority = priority;
    *out = static_cast<Object*>(stream);
    return SUCCESS;
}

EXPORT int cuStreamCreate(void** out, unsigned flags) {
    BEGIN("cuStreamCreate")
    NEEDS_CONTEXT
    CHECK(flags <= 1, INVALID_VALUE)
    auto* stream = new Stream;
    stream->context = context;
    stream->flags = flags;
    *out = static_cast<Object*>(stream);
    return SUCCESS;
}

EXPORT int cuStreamDestroy_v2(void* handle) {
    Call call("cuStreamDestroy");
    auto* stream = find<Stream>(handle);
    CHECK(stream, INVALID_HANDLE)
    if (stream->capture) {
        problem("a stream was destroyed while it was captured");
        Graph* graph = stream->capture->graph;
        abandon(stream->capture);
        destroy(graph);
    }
    stream->alive = false;
    return call.status;
}

EXPORT int cuStreamGetCtx(void* handle, void** out) {
    BEGIN("cuStreamGetCtx")
    Stream* stream = find_stream(handle);
    CHECK(stream, INVALID_HANDLE)
    *out = static_cast<Object*>(stream->context);
    return SUCCESS;
}

EXPORT int cuStreamGetFlags(void* handle, unsigned* flags) {
    BEGIN("cuStreamGetFlags")
    Stream* stream = find_stream(handle);
    CHECK(stream, INVALID_HANDLE)
    *flags = stream->flags;
    return SUCCESS;
}

EXPORT int cuStreamGetPriority(void* handle, int* priority) {
    BEGIN("cuStreamGetPriority")
    Stream* stream = find_stream(handle);
    CHECK(stream, INVALID_HANDLE)
    *priority = stream->priority;
    return SUCCESS;
}

EXPORT int cuStreamSynchronize(void* handle) {
    BEGIN("cuStreamSynchronize")
    NEEDS_CONTEXT
    return synchronize(find_stream(handle));
}

EXPORT int cuStreamQuery(void* handle) {
    BEGIN("cuStreamQuery")
    NEEDS_CONTEXT
    return synchronize(find_stream(handle));
}

EXPORT int cuEventCreate(void** out, unsigned flags) {
    BEGIN("cuEventCreate")
    NEEDS_CONTEXT
    auto* event = new Event;
    event->context = context;
    event->timing = !(flags & 2);
    *out = static_cast<Object*>(event);
    return SUCCESS;
}

EXPORT int cuEventDestroy_v2(void* handle) {
    Call call("cuEventDestroy");
    auto* event = find<Event>(handle);
    CHECK(event, INVALID_HANDLE)
    event->alive = false;
    return call.status;
}

EXPORT int cuEventRecord(void* event_handle, void* stream_handle) {
    BEGIN("cuEventRecord")
    NEEDS_CONTEXT
    auto* event = find<Event>(event_handle);
    Stream* stream = find_stream(stream_handle);
    CHECK(event && stream && stream->context == context && event->context == context,
          INVALID_HANDLE)
    event->recorded = !stream->capture;
    event->time = std::chrono::steady_clock::now();
    event->capture = stream->capture;
    event->last = stream->last;
    return SUCCESS;
}

EXPORT int cuStreamWaitEvent(void* stream_handle, void* event_handle, unsigned) {
    BEGIN("cuStreamWaitEvent")
    NEEDS_CONTEXT
    auto* event = find<Event>(event_handle);
    Stream* stream = find_stream(stream_handle);
    CHECK(event && stream && stream->context == context, INVALID_HANDLE)
    if (stream->capture && !event->capture) {
        stream->capture->valid = false;
        return STREAM_CAPTURE_ISOLATION;
    }
    if (!event->capture) return SUCCESS;
    CHECK(driver().captures.count(event->capture), INVALID_VALUE)
    CHECK(!stream->capture || stream->capture == event->capture, STREAM_CAPTURE_MERGE)
    stream->capture = event->capture;
    stream->capture->streams.insert(stream);
    stream->last.insert(event->last.begin(), event->last.end());
    return SUCCESS;
}

EXPORT int cuEventSynchronize(void* handle) {
    BEGIN("cuEventSynchronize")
    NEEDS_CONTEXT
    auto* event = find<Event>(handle);
    CHECK(event, INVALID_HANDLE)
    return event->capture ? CAPTURED_EVENT : SUCCESS;
}

EXPORT int cuEventQuery(void* handle) {
    BEGIN("cuEventQuery")
    NEEDS_CONTEXT
    auto* event = find<Event>(handle);
    CHECK(event, INVALID_HANDLE)
    return event->capture ? CAPTURED_EVENT : SUCCESS;
}

EXPORT int cuEventElapsedTime_v2(float* milliseconds, void* start_handle, void* end_handle) {
    BEGIN("cuEventElapsedTime")
    auto *start = find<Event>(start_handle), *end = find<Event>(end_handle);
    CHECK(start && end && start->recorded && end->recorded, INVALID_HANDLE)
    CHECK(start->timing && end->timing, INVALID_HANDLE)
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return SUCCESS;
}

EXPORT int cuStreamBeginCapture_v2(void* handle, int mode) {
    BEGIN("cuStreamBeginCapture")
    NEEDS_CONTEXT
    auto* stream = find<Stream>(handle);  // not the default one
    CHECK(stream && stream->context == context, STREAM_CAPTURE_UNSUPPORTED)
    CHECK(!stream->capture && mode >= CAPTURE_GLOBAL && mode <= CAPTURE_RELAXED, INVALID_VALUE)
    auto* capture =
        new Capture{new Graph, stream, mode, std::this_thread::get_id(), true, {stream}};
    driver().captures.insert(capture);
    stream->capture = capture;
    stream->last.clear();
    return SUCCESS;
}

EXPORT int cuStreamEndCapture(void* handle, void** graph) {
    Call call("cuStreamEndCapture");
    NEEDS_CONTEXT
    auto* stream = find<Stream>(handle);
    CHECK(stream, INVALID_HANDLE)
    void* captured = nullptr;
    const Status status = end_capture(stream, &captured);
    if (call.status != SUCCESS) {  // ordered by a test: as where the capture became invalid
        if (auto* dropped = find<Graph>(captured)) destroy(dropped);
        captured = nullptr;
    }
    if (graph) *graph = captured;
    return call.status != SUCCESS ? call.status : status;
}

EXPORT int cuStreamIsCapturing(void* handle, int* state) {
    BEGIN("cuStreamIsCapturing")
    Stream* stream = find_stream(handle);
    CHECK(stream, INVALID_HANDLE)
    *state = !stream->capture ? 0 : stream->capture->valid ? 1 : 2;
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------------
// Kernels.

EXPORT int cuLibraryLoadData(void** out, const void* code, void*, void*, unsigned, void*, void*,
                             unsigned) {
    BEGIN("cuLibraryLoadData")
    CHECK(driver().initialized, NOT_INITIALIZED)
    Library* library = nullptr;
    CHECKED(load_library(&library, code))
    *out = static_cast<Object*>(library);
    return SUCCESS;
}

EXPORT int cuLibraryUnload(void* handle) {
    Call call("cuLibraryUnload");
    auto* library = find<Library>(handle);
    CHECK(library, INVALID_HANDLE)
    unload(library);
    return call.status;
}

EXPORT int cuLibraryGetKernel(void** out, void* library, const char* name) {
    BEGIN("cuLibraryGetKernel")
    return get_kernel(out, find<Library>(library), name);
}

EXPORT int cuModuleLoadDataEx(void** out, const void* code, unsigned, void*, void*) {
    BEGIN("cuModuleLoadDataEx")
    NEEDS_CONTEXT
    Library* library = nullptr;
    CHECKED(load_library(&library, code))
    *out = static_cast<Object*>(library);
    return SUCCESS;
}

EXPORT int cuModuleUnload(void* handle) {
    Call call("cuModuleUnload");
    NEEDS_CONTEXT
    auto* library = find<Library>(handle);
    CHECK(library, INVALID_HANDLE)
    unload(library);
    return call.status;
}

EXPORT int cuModuleGetFunction(void** out, void* module, const char* name) {
    BEGIN("cuModuleGetFunction")
    NEEDS_CONTEXT
    return get_kernel(out, find<Library>(module), name);
}

EXPORT int cuFuncGetAttribute(int* value, int, void*) {
    BEGIN("cuFuncGetAttribute")
    *value = 0;
    return SUCCESS;
}

// pycuda says the shape before every launch, and again with it.
EXPORT int cuFuncSetBlockShape(void*, int, int, int) {
    BEGIN("cuFuncSetBlockShape")
    return SUCCESS;
}

EXPORT int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                          unsigned block_x, unsigned block_y, unsigned block_z, unsigned,
                          void* stream, void** params, void** extra) {
    BEGIN("cuLaunchKernel")
    NEEDS_CONTEXT
    const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
    Work work;
    CHECKED(kernel_work(work, function, grid, block, params, extra))
    return enqueue(stream, std::move(work));
}

EXPORT int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** params,
                            void** extra) {
    BEGIN("cuLaunchKernelEx")
    NEEDS_CONTEXT
    Work work;
    CHECKED(kernel_work(work, function, config->grid, config->block, params, extra))
    return enqueue(config->stream, std::move(work));
}

// ---------------------------------------------------------------------------------------------
// Graphs.

EXPORT int cuGraphCreate(void** out, unsigned flags) {
    BEGIN("cuGraphCreate")
    CHECK(flags == 0, INVALID_VALUE)
    *out = static_cast<Object*>(new Graph);
    return SUCCESS;
}

EXPORT int cuGraphDestroy(void* handle) {
    Call call("cuGraphDestroy");
    auto* graph = find<Graph>(handle);
    if (!graph) {
        problem("a graph was destroyed that is none, or was destroyed before");
        return INVALID_VALUE;
    }
    CHECK(graph->root == graph, INVALID_VALUE)
    for (Capture* capture : driver().captures) {
        if (capture->graph == graph) problem("a graph was destroyed while it was captured");
    }
    destroy(graph);
    return call.status;
}

EXPORT int cuGraphAddKernelNode_v2(void** out, void* graph, void** before, size_t n_before,
                                   const KernelNodeParams* params) {
    BEGIN("cuGraphAddKernelNode")
    NEEDS_CONTEXT
    CHECK(!params->context || params->context == static_cast<Object*>(context), INVALID_VALUE)
    Work work;
    CHECKED(kernel_work(work, params->func ? params->func : params->kern, params->grid,
                        params->block, params->params, params->extra))
    return add_node(out, graph, before, n_before, std::move(work));
}

EXPORT int cuGraphAddMemcpyNode(void** out, void* graph, void** before, size_t n_before,
                                const Memcpy3D* params, void* node_context) {
    BEGIN("cuGraphAddMemcpyNode")
    NEEDS_CONTEXT
    CHECK(node_context == static_cast<Object*>(context), INVALID_CONTEXT)
    CHECK(params->height == 1 && params->depth == 1, INVALID_VALUE)
    CHECKED(check_range(address_of(params->source), params->width))
    CHECKED(check_range(address_of(params->target), params->width))
    Work work;
    work.type = NODE_MEMCPY;
    work.memcpy = *params;
    return add_node(out, graph, before, n_before, std::move(work));
}

EXPORT int cuGraphAddMemsetNode(void** out, void* graph, void** before, size_t n_before,
                                const MemsetNodeParams* params, void* node_context) {
    BEGIN("cuGraphAddMemsetNode")
    NEEDS_CONTEXT
    CHECK(node_context == static_cast<Object*>(context), INVALID_CONTEXT)
    CHECK(params->height == 1, INVALID_VALUE)
    Work work;
    work.type = NODE_MEMSET;
    work.memset = *params;
    return add_node(out, graph, before, n_before, std::move(work));
}

EXPORT int cuGraphAddEmptyNode(void** out, void* graph, void** before, size_t n_before) {
    BEGIN("cuGraphAddEmptyNode")
    return add_node(out, graph, before, n_before, Work{});
}

EXPORT int cuGraphAddChildGraphNode(void** out, void* graph, void** before, size_t n_before,
                                    void* child_handle) {
    BEGIN("cuGraphAddChildGraphNode")
    auto* parent = find<Graph>(graph);
    auto* child = find<Graph>(child_handle);
    CHECK(parent && child && child->root != parent->root, INVALID_VALUE)
    CHECK(!has_conditions(child), NOT_SUPPORTED)
    Work work;
    work.type = NODE_GRAPH;
    work.child = clone(child, "part of a graph", parent->root);
    return add_node(out, graph, before, n_before, std::move(work));
}

EXPORT int cuGraphConditionalHandleCreate(uint64_t* handle, void* graph_handle, void* node_context,
                                          unsigned default_value, unsigned flags) {
    BEGIN("cuGraphConditionalHandleCreate")
    auto* graph = find<Graph>(graph_handle);
    auto* context = find<Context>(node_context);
    CHECK(graph && context && graph->root == graph, INVALID_VALUE)
    *handle = driver().next_condition++;
    driver().conditions[*handle] = {graph, context, default_value, default_value, (flags & 1) != 0};
    graph->conditions.push_back(*handle);
    return SUCCESS;
}

namespace {
Status add_conditional(void** out, void* graph_handle, void** before, size_t n_before,
                       NodeParams* params) {
    static std::vector<std::unique_ptr<void*[]>> arrays;  // "valid for the lifetime of the node"
    auto* graph = find<Graph>(graph_handle);
    CHECK(graph && params && params->type == NODE_CONDITIONAL, NOT_SUPPORTED)
    ConditionalNodeParams& wanted = params->conditional;
    CHECK(wanted.type == 0 && wanted.size == 1, NOT_SUPPORTED)  // IF
    const auto found = driver().conditions.find(wanted.handle);
    CHECK(found != driver().conditions.end(), INVALID_VALUE)
    Condition& condition = found->second;
    CHECK(condition.root == graph->root && !condition.node, INVALID_VALUE)
    CHECK(wanted.context == static_cast<Object*>(condition.context), INVALID_VALUE)
    Work work;
    work.type = NODE_CONDITIONAL;
    work.condition = wanted.handle;
    work.child = new Graph("part of a graph");
    work.child->root = graph->root;
    arrays.emplace_back(new void*[1]{static_cast<Object*>(work.child)});
    CHECKED(add_node(out, graph_handle, before, n_before, work))
    condition.node = find<Node>(*out);
    wanted.graphs = arrays.back().get();
    return SUCCESS;
}
}  // namespace

EXPORT int cuGraphAddNode(void** out, void* graph, void** before, size_t n_before,
                          NodeParams* params) {
    BEGIN("cuGraphAddNode")
    return add_conditional(out, graph, before, n_before, params);
}
EXPORT int cuGraphAddNode_v2(void** out, void* graph, void** before, const void* edges,
                             size_t n_before, NodeParams* params) {
    BEGIN("cuGraphAddNode")
    CHECK(!edges, NOT_SUPPORTED)
    return add_conditional(out, graph, before, n_before, params);
}

EXPORT int cuGraphDestroyNode(void* handle) {
    Call call("cuGraphDestroyNode");
    auto* node = find<Node>(handle);
    CHECK(node, INVALID_VALUE)
    std::vector<Node*>& nodes = node->graph->nodes;
    for (size_t i = nodes.size(); i-- > 0;) {
        if (nodes[i] == node)
            nodes.erase(nodes.begin() + i);
        else
            nodes[i]->before.erase(node);
    }
    node->alive = false;
    if (node->work.child) destroy(node->work.child);
    return call.status;
}

EXPORT int cuGraphGetNodes(void* handle, void** nodes, size_t* count) {
    BEGIN("cuGraphGetNodes")
    auto* graph = find<Graph>(handle);
    CHECK(graph && count, INVALID_VALUE)
    const size_t room = nodes ? *count : 0;
    for (size_t i = 0; i < room; ++i) {
        nodes[i] = i < graph->nodes.size() ? static_cast<Object*>(graph->nodes[i]) : nullptr;
    }
    if (!nodes || room > graph->nodes.size()) *count = graph->nodes.size();
    return SUCCESS;
}

EXPORT int cuGraphNodeGetType(void* handle, int* type) {
    BEGIN("cuGraphNodeGetType")
    auto* node = find<Node>(handle);
    CHECK(node, INVALID_VALUE)
    *type = node->work.type;
    return SUCCESS;
}

EXPORT int cuGraphChildGraphNodeGetGraph(void* handle, void** graph) {
    BEGIN("cuGraphChildGraphNodeGetGraph")
    auto* node = find<Node>(handle);
    CHECK(node && node->work.type == NODE_GRAPH, INVALID_VALUE)
    *graph = static_cast<Object*>(node->work.child);
    return SUCCESS;
}

EXPORT int cuGraphNodeFindInClone(void** out, void* original, void* clone_handle) {
    BEGIN("cuGraphNodeFindInClone")
    auto* copy = find<Graph>(clone_handle);
    auto* wanted = find<Node>(original);
    CHECK(copy && wanted, INVALID_VALUE)
    for (Node* node : copy->nodes) {
        if (node->origin == wanted) {
            *out = static_cast<Object*>(node);
            return SUCCESS;
        }
    }
    return INVALID_VALUE;
}

namespace {
Status instantiate(void** out, void* handle, int* result) {
    *result = 1;  // CUDA_GRAPH_INSTANTIATE_ERROR
    auto* graph = find<Graph>(handle);
    CHECK(graph && graph->root == graph, INVALID_VALUE)
    for (uint64_t condition : graph->conditions) {
        if (driver().conditions.at(condition).node) continue;
        *result = 5;  // CUDA_GRAPH_INSTANTIATE_CONDITIONAL_HANDLE_UNUSED
        return INVALID_VALUE;
    }
    // "Only one instantiation of the graph may exist at any point in time."
    CHECK(graph->conditions.empty() || !graph->running || !graph->running->alive, NOT_SUPPORTED)
    auto* executable = new Executable;
    executable->source = graph;
    executable->graph = clone(graph, "part of an executable graph", nullptr);
    graph->running = executable->graph;
    *out = static_cast<Object*>(executable);
    *result = 0;
    return SUCCESS;
}
}  // namespace

EXPORT int cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long) {
    BEGIN("cuGraphInstantiateWithFlags")
    NEEDS_CONTEXT
    int result = 0;
    return instantiate(out, graph, &result);
}

EXPORT int cuGraphInstantiateWithParams(void** out, void* graph, InstantiateParams* params) {
    BEGIN("cuGraphInstantiateWithParams")
    NEEDS_CONTEXT
    return instantiate(out, graph, &params->result);
}

EXPORT int cuGraphUpload(void* handle, void* stream_handle) {
    BEGIN("cuGraphUpload")
    NEEDS_CONTEXT
    Stream* stream = find_stream(stream_handle);
    CHECK(find<Executable>(handle), INVALID_VALUE)
    CHECK(stream && stream->context == context, INVALID_HANDLE)
    return SUCCESS;
}

EXPORT int cuGraphLaunch(void* handle, void* stream_handle) {
    BEGIN("cuGraphLaunch")
    NEEDS_CONTEXT
    auto* executable = find<Executable>(handle);
    Stream* stream = find_stream(stream_handle);
    CHECK(executable, INVALID_VALUE)
    CHECK(stream && stream->context == context, INVALID_HANDLE)
    if (stream->capture) {
        stream->capture->valid = false;
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    for (auto& [number, condition] : driver().conditions) {
        if (condition.root != executable->source) continue;
        if (condition.assign_default) condition.value = condition.default_value;
    }
    driver().running = executable->source;
    const Status status = run_graph(executable->graph);
    driver().running = nullptr;
    return status;
}

EXPORT int cuGraphExecDestroy(void* handle) {
    Call call("cuGraphExecDestroy");
    auto* executable = find<Executable>(handle);
    CHECK(executable, INVALID_VALUE)
    executable->alive = false;
    destroy(executable->graph);
    return call.status;
}

EXPORT int cuUserObjectCreate(void** out, void* pointer, void (*destroy)(void*), unsigned count,
                              unsigned flags) {
    BEGIN("cuUserObjectCreate")
    CHECK(out && destroy && count && flags == 1, INVALID_VALUE)
    auto* object = new UserObject;
    object->pointer = pointer;
    object->destroy = destroy;
    object->references = count;
    *out = static_cast<Object*>(object);
    return SUCCESS;
}

EXPORT int cuUserObjectRelease(void* handle, unsigned count) {
    Call call("cuUserObjectRelease");
    auto* object = find<UserObject>(handle);
    CHECK(object && object->references >= count, INVALID_VALUE)
    drop(object, count);
    return call.status;
}

EXPORT int cuGraphRetainUserObject(void* graph_handle, void* handle, unsigned count,
                                   unsigned flags) {
    BEGIN("cuGraphRetainUserObject")
    auto* graph = find<Graph>(graph_handle);
    auto* object = find<UserObject>(handle);
    CHECK(graph && object && count, INVALID_VALUE)
    graph->user_objects[object] += count;
    if (!(flags & 1)) object->references += count;  // 1: the caller's references are taken over
    return SUCCESS;
}

EXPORT int cuGraphReleaseUserObject(void* graph_handle, void* handle, unsigned count) {
    Call call("cuGraphReleaseUserObject");
    auto* graph = find<Graph>(graph_handle);
    auto* object = find<UserObject>(handle);
    CHECK(graph && object && graph->user_objects[object] >= count, INVALID_VALUE)
    if ((graph->user_objects[object] -= count) == 0) graph->user_objects.erase(object);
    drop(object, count);
    return call.status;
}

// ---------------------------------------------------------------------------------------------
// What is only named by those who link against the driver, and how they find the rest.

#define STUB(name)                   \
    EXPORT int name() {              \
        BEGIN(#name)                 \
        problem(#name " is a stub"); \
        return NOT_SUPPORTED;        \
    }
STUB(cuArray3DCreate_v2)
STUB(cuArray3DGetDescriptor_v2)
STUB(cuArrayCreate_v2)
STUB(cuArrayDestroy)
STUB(cuArrayGetDescriptor_v2)
STUB(cuCtxAttach)
STUB(cuCtxDetach)
STUB(cuCtxDisablePeerAccess)
STUB(cuCtxEnablePeerAccess)
STUB(cuCtxGetCacheConfig)
STUB(cuCtxGetLimit)
STUB(cuCtxGetSharedMemConfig)
STUB(cuCtxSetCacheConfig)
STUB(cuCtxSetLimit)
STUB(cuCtxSetSharedMemConfig)
STUB(cuDeviceCanAccessPeer)
STUB(cuDeviceGetByPCIBusId)
STUB(cuDeviceGetPCIBusId)
STUB(cuFuncSetAttribute)
STUB(cuFuncSetCacheConfig)
STUB(cuFuncSetSharedSize)
STUB(cuIpcCloseMemHandle)
STUB(cuIpcGetEventHandle)
STUB(cuIpcGetMemHandle)
STUB(cuIpcOpenEventHandle)
STUB(cuIpcOpenMemHandle_v2)
STUB(cuLaunch)
STUB(cuLaunchGrid)
STUB(cuLaunchGridAsync)
STUB(cuLinkAddData_v2)
STUB(cuLinkAddFile_v2)
STUB(cuLinkComplete)
STUB(cuLinkCreate_v2)
STUB(cuLinkDestroy)
STUB(cuMemAllocManaged)
STUB(cuMemAllocPitch_v2)
STUB(cuMemGetAddressRange_v2)
STUB(cuMemHostGetFlags)
STUB(cuMemHostRegister_v2)
STUB(cuMemHostUnregister)
STUB(cuMemcpy2DAsync_v2)
STUB(cuMemcpy2DUnaligned_v2)
STUB(cuMemcpy2D_v2)
STUB(cuMemcpy3DAsync_v2)
STUB(cuMemcpy3DPeer)
STUB(cuMemcpy3DPeerAsync)
STUB(cuMemcpy3D_v2)
STUB(cuMemcpyAtoA_v2)
STUB(cuMemcpyAtoD_v2)
STUB(cuMemcpyAtoH_v2)
STUB(cuMemcpyDtoA_v2)
STUB(cuMemcpyDtoD_v2)
STUB(cuMemcpyDtoHAsync_v2)
STUB(cuMemcpyDtoH_v2)
STUB(cuMemcpyHtoA_v2)
STUB(cuMemcpyHtoDAsync_v2)
STUB(cuMemcpyHtoD_v2)
STUB(cuMemcpyPeer)
STUB(cuMemcpyPeerAsync)
STUB(cuMemsetD16Async)
STUB(cuMemsetD16_v2)
STUB(cuMemsetD2D16Async)
STUB(cuMemsetD2D16_v2)
STUB(cuMemsetD2D32Async)
STUB(cuMemsetD2D32_v2)
STUB(cuMemsetD2D8Async)
STUB(cuMemsetD2D8_v2)
STUB(cuMemsetD32_v2)
STUB(cuModuleGetGlobal_v2)
STUB(cuModuleGetSurfRef)
STUB(cuModuleGetTexRef)
STUB(cuModuleLoad)
STUB(cuModuleLoadData)
STUB(cuParamSetSize)
STUB(cuParamSetTexRef)
STUB(cuParamSetf)
STUB(cuParamSeti)
STUB(cuParamSetv)
STUB(cuProfilerInitialize)
STUB(cuProfilerStart)
STUB(cuProfilerStop)
STUB(cuStreamAttachMemAsync)
STUB(cuSurfRefGetArray)
STUB(cuSurfRefSetArray)
STUB(cuTexRefCreate)
STUB(cuTexRefDestroy)
STUB(cuTexRefGetAddressMode)
STUB(cuTexRefGetAddress_v2)
STUB(cuTexRefGetArray)
STUB(cuTexRefGetFilterMode)
STUB(cuTexRefGetFlags)
STUB(cuTexRefGetFormat)
STUB(cuTexRefSetAddress2D_v3)
STUB(cuTexRefSetAddressMode)
STUB(cuTexRefSetAddress_v2)
STUB(cuTexRefSetArray)
STUB(cuTexRefSetFilterMode)
STUB(cuTexRefSetFlags)
STUB(cuTexRefSetFormat)

// NVRTC looks for its cache of compiled kernels here, and does without.
EXPORT int cuGetExportTable(const void** table, const void*) {
    *table = nullptr;
    return NOT_FOUND;
}

EXPORT int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t,
                               int* found);

namespace {
// Where the same name had several signatures, by the version that brought each.
const std::map<std::string, std::map<int, const char*>> VERSIONS = {
    {"cuCtxCreate", {{3020, "cuCtxCreate_v2"}, {12050, "cuCtxCreate_v4"}}},
    {"cuGraphAddNode", {{12020, "cuGraphAddNode"}, {12030, "cuGraphAddNode_v2"}}},
};
}  // namespace

EXPORT int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}

EXPORT int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t,
                               int* found) {
    *function = nullptr;
    std::vector<std::string> candidates;
    const auto versions = VERSIONS.find(name);
    if (versions != VERSIONS.end()) {
        for (const auto& [since, symbol] : versions->second) {
            if (since <= version) candidates = {symbol};
        }
    } else {
        candidates = {std::string(name) + "_v2", name};
    }
    static void* const self = [] {
        Dl_info info;
        dladdr(reinterpret_cast<void*>(&cuGetProcAddress_v2), &info);
        return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    }();
    for (const std::string& candidate : candidates) {
        if (!*function) *function = dlsym(self, candidate.c_str());
    }
    if (found) *found = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
