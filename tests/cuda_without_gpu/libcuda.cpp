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
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// ---------------------------------------------------------------------------------------------
// The ABI, as far as it is needed.

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
    {209, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {600, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {700, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {709, {"CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"}},
    {719, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {801, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {803, {"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"}},
    {900, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
    {901, {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"}},
    {902, {"CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences"}},
    {903, {"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"}},
    {904, {"CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"}},
    {905, {"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"}},
    {907, {"CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"}},
    {908, {"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread"}},
    {999, {"CUDA_ERROR_UNKNOWN", "unknown error"}},
};

enum { NODE_KERNEL = 0, NODE_MEMCPY = 1, NODE_MEMSET = 2, NODE_GRAPH = 4, NODE_EMPTY = 5, NODE_CONDITIONAL = 13 };
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

// ---------------------------------------------------------------------------------------------
// What the driver knows.

typedef void (*HostKernel)(void** params, unsigned grid, unsigned block);
typedef void (*ConditionalHandler)(unsigned long long handle, unsigned value);
typedef void (*SetConditionalHandler)(ConditionalHandler handler);

struct Object {
    explicit Object(const char* kind);
    virtual ~Object() = default;
    const char* kind;
    bool alive = true;
    unsigned epoch;  // which emulated_reset it came after
};

struct Context : Object {
    explicit Context(int device, bool primary)
        : Object(primary ? "primary context" : "context"), device(device) {}
    int device;
    int references = 0;  // of a primary context
};

struct Allocation {
    size_t bytes;
    bool host;
    bool alive;
    unsigned epoch;
};

struct Capture;
struct Node;

struct Stream : Object {
    Stream() : Object("stream") {}
    Context* context = nullptr;
    unsigned flags = 0;
    int priority = 0;
    Capture* capture = nullptr;
    std::set<Node*> last;  // what the next captured node depends on
};

struct Event : Object {
    Event() : Object("event") {}
    Context* context = nullptr;
    bool timing = true, recorded = false;
    std::chrono::steady_clock::time_point time;
    Capture* capture = nullptr;
    std::set<Node*> last;
};

struct Library;
struct Kernel : Object {
    Kernel() : Object("kernel") {}
    std::string name;
    Library* library = nullptr;
    std::vector<std::pair<size_t, size_t>> params;  // offset, size
};

struct Library : Object {
    Library() : Object("library") {}
    std::string image;
    std::map<std::string, Kernel*> kernels;
};

struct UserObject : Object {
    UserObject() : Object("user object") {}
    void* pointer = nullptr;
    void (*destroy)(void*) = nullptr;
    long references = 0;
};

struct Graph;
struct Condition {
    Graph* root;
    Context* context;
    unsigned value, default_value;
    bool assign_default;
    Node* node = nullptr;
};

struct Work {  // what a node does, or a stream at once
    int type = NODE_EMPTY;
    Kernel* kernel = nullptr;
    unsigned grid = 1, block = 1;
    std::vector<std::vector<char>> params;
    Memcpy3D memcpy{};
    MemsetNodeParams memset{};
    Graph* child = nullptr;  // of a child graph, or the body of a conditional
    uint64_t condition = 0;
};

struct Node : Object {
    explicit Node(Work work) : Object("node"), work(std::move(work)) {}
    Work work;
    Graph* graph = nullptr;
    std::set<Node*> before;
    const Node* origin = nullptr;  // in a clone
};

struct Graph : Object {
    explicit Graph(const char* kind = "graph") : Object(kind) {}
    Graph* root = this;
    std::vector<Node*> nodes;
    std::map<UserObject*, unsigned> user_objects;
    std::vector<uint64_t> conditions;  // of a root
    Graph* running = nullptr;          // its executable clone, where it has conditions
};

struct Executable : Object {
    Executable() : Object("executable graph") {}
    Graph* graph = nullptr;
    Graph* source = nullptr;
};

struct Capture {
    Graph* graph;
    Stream* origin;
    int mode;
    std::thread::id thread;
    bool valid = true;
    std::set<Stream*> streams;
};

struct Fault {
    std::string function;
    long countdown;
    int status;
};

struct Driver {
    std::recursive_mutex mutex;
    unsigned epoch = 0;
    bool initialized = false;
    int version = 13000, devices = 1;
    bool integrated = false;
    std::map<int, Context*> primary;
    std::unordered_set<void*> known;  // every object that ever was
    std::vector<Object*> objects;
    std::map<uintptr_t, Allocation> memory;
    std::map<std::string, HostKernel> kernels;
    std::set<SetConditionalHandler> setters;
    std::map<uint64_t, Condition> conditions;
    uint64_t next_condition = 0x1000;
    std::set<Capture*> captures;
    std::vector<Fault> faults;
    std::vector<std::string> log;
    std::vector<std::string> problems;
    std::vector<std::pair<void (*)(void*), void*>> destroyed;  // user objects to be told
    Graph* running = nullptr;
    Status running_status = SUCCESS;
};

Driver& driver() {
    static Driver* instance = new Driver;  // never destroyed: others call it while they unload
    return *instance;
}

thread_local std::vector<Context*> context_stack;

Object::Object(const char* kind) : kind(kind), epoch(driver().epoch) {
    driver().known.insert(this);
    driver().objects.push_back(this);
}

template <typename T>
T* find(void* handle) {
    if (!handle || !driver().known.count(handle)) return nullptr;
    T* object = dynamic_cast<T*>(static_cast<Object*>(handle));
    return object && object->alive ? object : nullptr;
}

std::string plain_name(const char* name) {
    std::string text(name);
    const size_t end = text.rfind("_v");
    if (end != std::string::npos && text.find_first_not_of("0123456789", end + 2) == std::string::npos) {
        text.resize(end);
    }
    return text;
}

// One call of an entry point: the lock, the log and the faults that a test ordered. What destroys
// fails after it did its work, as CUDA reports an earlier error there.
class Call {
   public:
    explicit Call(const char* name) : lock_(driver().mutex) {
        const std::string plain = plain_name(name);
        driver().log.push_back(plain);
        for (auto fault = driver().faults.begin(); fault != driver().faults.end(); ++fault) {
            if ((fault->function == plain || fault->function == "*") && --fault->countdown == 0) {
                status = static_cast<Status>(fault->status);
                driver().faults.erase(fault);
                break;
            }
        }
    }
    ~Call() {
        std::vector<std::pair<void (*)(void*), void*>> destroyed;
        destroyed.swap(driver().destroyed);
        lock_.unlock();  // what is called may wait for Python's lock
        for (const auto& [destroy, pointer] : destroyed) destroy(pointer);
    }
    Status status = SUCCESS;

   private:
    std::unique_lock<std::recursive_mutex> lock_;
};

#define BEGIN(name)  \
    Call call(name); \
    if (call.status != SUCCESS) return call.status;
#define CHECK(condition, error) \
    if (!(condition)) return error;
#define CHECKED(expression) \
    if (const Status status_ = (expression); status_ != SUCCESS) return status_;
#define NEEDS_CONTEXT                                    \
    CHECK(driver().initialized, NOT_INITIALIZED)         \
    Context* const context = current_context();          \
    CHECK(context, INVALID_CONTEXT)                      \
    CHECK(context->alive, CONTEXT_IS_DESTROYED)

Context* current_context() { return context_stack.empty() ? nullptr : context_stack.back(); }

void problem(const std::string& text) { driver().problems.push_back(text); }

// ---------------------------------------------------------------------------------------------
// Memory.

constexpr unsigned char FRESH = 0xCD, FREED = 0xDD;

// The allocation that holds an address, alive or not.
std::pair<const uintptr_t, Allocation>* allocation_of(uintptr_t address) {
    auto after = driver().memory.upper_bound(address);
    if (after == driver().memory.begin()) return nullptr;
    auto& found = *std::prev(after);
    return address < found.first + found.second.bytes ? &found : nullptr;
}

Status check_range(uintptr_t address, size_t bytes) {
    const auto* found = allocation_of(address);
    CHECK(found, INVALID_VALUE)
    CHECK(found->second.alive, ILLEGAL_ADDRESS)
    CHECK(address + bytes <= found->first + found->second.bytes, INVALID_VALUE)
    return SUCCESS;
}

Status allocate(void** pointer, size_t bytes, bool host) {
    CHECK(pointer && bytes, INVALID_VALUE)
    CHECK(bytes < size_t{1} << 40, OUT_OF_MEMORY)
    void* memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    CHECK(memory, OUT_OF_MEMORY)
    std::memset(memory, FRESH, bytes);
    driver().memory[reinterpret_cast<uintptr_t>(memory)] = {bytes, host, true, driver().epoch};
    *pointer = memory;
    return SUCCESS;
}

// What was freed stays here until the next reset, so that a use of it is noticed.
Status release(uintptr_t address, bool host) {
    auto found = driver().memory.find(address);
    CHECK(found != driver().memory.end() && found->second.host == host, INVALID_VALUE)
    if (!found->second.alive) {
        problem("memory was freed twice");
        return INVALID_VALUE;
    }
    found->second.alive = false;
    std::memset(reinterpret_cast<void*>(address), FREED, found->second.bytes);
    return SUCCESS;
}

void check_freed_memory() {
    for (const auto& [address, allocation] : driver().memory) {
        if (allocation.alive) continue;
        const auto* bytes = reinterpret_cast<const unsigned char*>(address);
        for (size_t i = 0; i < allocation.bytes; ++i) {
            if (bytes[i] != FREED) {
                problem("memory was written after it was freed");
                break;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Cubins: names of kernels, and the sizes of their parameters.

template <typename T>
T read_at(const char* image, size_t offset) {
    T value;
    std::memcpy(&value, image + offset, sizeof value);
    return value;
}

struct Section {
    std::string name;
    size_t offset, bytes;
};

std::vector<Section> sections_of(const char* image) {
    const auto table = read_at<uint64_t>(image, 0x28);
    const auto entry = read_at<uint16_t>(image, 0x3A);
    const auto count = read_at<uint16_t>(image, 0x3C);
    const auto names_index = read_at<uint16_t>(image, 0x3E);
    const auto names = read_at<uint64_t>(image, table + names_index * entry + 0x18);
    std::vector<Section> sections;
    for (unsigned i = 0; i < count; ++i) {
        const size_t at = table + i * entry;
        const bool in_file = read_at<uint32_t>(image, at + 4) != 8;  // SHT_NOBITS
        sections.push_back({image + names + read_at<uint32_t>(image, at),
                            read_at<uint64_t>(image, at + 0x18),
                            in_file ? read_at<uint64_t>(image, at + 0x20) : 0});
    }
    return sections;
}

// The records of .nv.info.KERNEL that describe parameters.
std::vector<std::pair<size_t, size_t>> params_of(const char* image, const Section& section) {
    constexpr unsigned char WITH_SIZE = 0x04, PARAMETER = 0x17;
    std::map<unsigned, std::pair<size_t, size_t>> params;
    for (size_t at = section.offset; at < section.offset + section.bytes;) {
        const auto format = read_at<unsigned char>(image, at);
        const auto attribute = read_at<unsigned char>(image, at + 1);
        const auto bytes = read_at<uint16_t>(image, at + 2);
        if (format == WITH_SIZE && attribute == PARAMETER) {
            params[read_at<uint16_t>(image, at + 8)] = {read_at<uint16_t>(image, at + 10),
                                                        read_at<uint32_t>(image, at + 12) >> 18};
        }
        at += 4 + (format == WITH_SIZE ? bytes : 0);
    }
    std::vector<std::pair<size_t, size_t>> ordered;
    for (const auto& [ordinal, param] : params) ordered.push_back(param);
    return ordered;
}

constexpr int COMPUTE_CAPABILITY = 87;  // as on a Jetson Orin

Status load_library(Library** out, const void* code) {
    const char* image = static_cast<const char*>(code);
    CHECK(image && std::memcmp(image, "\x7f" "ELF", 4) == 0, INVALID_IMAGE)
    const auto flags = read_at<uint32_t>(image, 0x30);
    const int version = image[8] >= 8 ? (flags >> 8) & 0xFF : flags & 0xFF;
    CHECK(version == COMPUTE_CAPABILITY, NO_BINARY_FOR_GPU)
    auto* library = new Library;
    std::map<std::string, std::vector<std::pair<size_t, size_t>>> params;
    const std::string text = ".text.", info = ".nv.info.";
    const auto sections = sections_of(image);
    for (const Section& section : sections) {
        if (section.name.rfind(info, 0) == 0) {
            params[section.name.substr(info.size())] = params_of(image, section);
        }
    }
    for (const Section& section : sections) {
        if (section.name.rfind(text, 0) != 0) continue;
        auto* kernel = new Kernel;
        kernel->name = section.name.substr(text.size());
        kernel->library = library;
        kernel->params = params[kernel->name];
        library->kernels[kernel->name] = kernel;
    }
    *out = library;
    return SUCCESS;
}

void unload(Library* library) {
    library->alive = false;
    for (auto& [name, kernel] : library->kernels) kernel->alive = false;
}

Status get_kernel(void** out, Library* library, const char* name) {
    CHECK(library, INVALID_HANDLE)
    CHECK(out && name, INVALID_VALUE)
    const auto found = library->kernels.find(name);
    CHECK(found != library->kernels.end(), NOT_FOUND)
    *out = static_cast<Object*>(found->second);
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------------
// Running.

void on_conditional(unsigned long long handle, unsigned value) {
    const auto found = driver().conditions.find(handle);
    if (!driver().running || found == driver().conditions.end() ||
        found->second.root != driver().running) {
        problem("a kernel set a condition that the running graph does not have");
        driver().running_status = LAUNCH_FAILED;
        return;
    }
    found->second.value = value;
}

Status run_kernel(const Work& work) {
    const Kernel* kernel = work.kernel;
    CHECK(kernel->alive, INVALID_HANDLE)
    std::vector<std::vector<char>> params = work.params;
    const auto code = driver().kernels.find(kernel->name);
    if (code == driver().kernels.end()) {
        problem("no host code was registered for the kernel " + kernel->name);
        return LAUNCH_FAILED;
    }
    for (const std::vector<char>& param : params) {
        if (param.size() != sizeof(uintptr_t)) continue;
        const auto* found = allocation_of(read_at<uintptr_t>(param.data(), 0));
        if (found && !found->second.alive) {
            problem("the kernel " + kernel->name + " was given memory that had been freed");
            return ILLEGAL_ADDRESS;
        }
    }
    for (SetConditionalHandler set : driver().setters) set(on_conditional);
    driver().running_status = SUCCESS;
    std::vector<void*> pointers;
    for (std::vector<char>& param : params) pointers.push_back(param.data());
    code->second(pointers.data(), work.grid, work.block);
    return driver().running_status;
}

Status run_copy(uintptr_t target, uintptr_t source, size_t bytes) {
    CHECKED(check_range(target, bytes))
    CHECKED(check_range(source, bytes))
    std::memmove(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), bytes);
    return SUCCESS;
}

Status run_set(uintptr_t target, unsigned value, size_t element_bytes, size_t count) {
    CHECK(element_bytes == 1 || element_bytes == 2 || element_bytes == 4, INVALID_VALUE)
    CHECKED(check_range(target, element_bytes * count))
    for (size_t i = 0; i < count; ++i) {
        std::memcpy(reinterpret_cast<char*>(target) + i * element_bytes, &value, element_bytes);
    }
    return SUCCESS;
}

uintptr_t address_of(const Memcpy3D::Side& side) {
    const uintptr_t base = side.type == 1 ? reinterpret_cast<uintptr_t>(side.host) : side.device;
    return base + side.x;
}

Status run_graph(Graph* graph);

Status run(const Work& work) {
    switch (work.type) {
        case NODE_KERNEL:
            return run_kernel(work);
        case NODE_MEMCPY:
            return run_copy(address_of(work.memcpy.target), address_of(work.memcpy.source),
                            work.memcpy.width);
        case NODE_MEMSET:
            return run_set(work.memset.target, work.memset.value, work.memset.element_bytes,
                           work.memset.width);
        case NODE_GRAPH:
            return run_graph(work.child);
        case NODE_CONDITIONAL:
            return driver().conditions.at(work.condition).value ? run_graph(work.child) : SUCCESS;
        default:
            return SUCCESS;
    }
}

// Of the nodes that may run, always the one that was added last.
Status run_graph(Graph* graph) {
    std::vector<Node*> waiting = graph->nodes;
    std::set<Node*> done;
    while (!waiting.empty()) {
        size_t chosen = waiting.size();
        for (size_t i = waiting.size(); i-- > 0 && chosen == waiting.size();) {
            bool ready = true;
            for (Node* node : waiting[i]->before) ready = ready && done.count(node);
            if (ready) chosen = i;
        }
        CHECK(chosen < waiting.size(), INVALID_VALUE)
        CHECKED(run(waiting[chosen]->work))
        done.insert(waiting[chosen]);
        waiting.erase(waiting.begin() + chosen);
    }
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------------
// Graphs.

void drop(UserObject* object, unsigned count) {
    object->references -= count;
    if (object->references <= 0 && object->alive) {
        object->alive = false;
        driver().destroyed.push_back({object->destroy, object->pointer});
    }
}

void destroy(Graph* graph) {
    graph->alive = false;
    for (Node* node : graph->nodes) {
        node->alive = false;
        if (node->work.child) destroy(node->work.child);
    }
    for (const auto& [object, count] : graph->user_objects) drop(object, count);
    graph->user_objects.clear();
}

Graph* clone(const Graph* source, const char* kind, Graph* root) {
    auto* copy = new Graph(kind);
    copy->root = root ? root : copy;
    std::map<const Node*, Node*> copies;
    for (const Node* node : source->nodes) {
        auto* made = new Node(node->work);
        made->graph = copy;
        made->origin = node;
        for (Node* before : node->before) made->before.insert(copies.at(before));
        if (node->work.child) made->work.child = clone(node->work.child, "part of a graph", copy->root);
        copies[node] = made;
        copy->nodes.push_back(made);
    }
    copy->user_objects = source->user_objects;
    for (const auto& [object, count] : copy->user_objects) object->references += count;
    return copy;
}

bool has_conditions(const Graph* graph) {
    if (!graph->conditions.empty()) return true;
    for (const Node* node : graph->nodes) {
        if (node->work.type == NODE_CONDITIONAL) return true;
        if (node->work.child && has_conditions(node->work.child)) return true;
    }
    return false;
}

Status add_node(void** out, void* graph_handle, void** before, size_t n_before, Work work) {
    auto* graph = find<Graph>(graph_handle);
    CHECK(graph && out, INVALID_VALUE)
    std::set<Node*> dependencies;
    for (size_t i = 0; i < n_before; ++i) {
        auto* dependency = find<Node>(before[i]);
        CHECK(dependency && dependency->graph == graph, INVALID_VALUE)
        CHECK(dependencies.insert(dependency).second, INVALID_VALUE)
    }
    auto* node = new Node(std::move(work));
    node->graph = graph;
    node->before = dependencies;
    graph->nodes.push_back(node);
    *out = static_cast<Object*>(node);
    return SUCCESS;
}

Status kernel_work(Work& work, void* function, const unsigned* grid, const unsigned* block,
                   void** params, void** extra) {
    work.type = NODE_KERNEL;
    work.kernel = find<Kernel>(function);
    CHECK(work.kernel, INVALID_HANDLE)
    CHECK(grid[0] && grid[1] == 1 && grid[2] == 1, INVALID_VALUE)
    CHECK(block[0] && block[0] <= 1024 && block[1] == 1 && block[2] == 1, INVALID_VALUE)
    work.grid = grid[0];
    work.block = block[0];
    const char* packed = nullptr;
    size_t packed_bytes = 0;
    for (void** at = extra; at && *at; at += 2) {
        const auto tag = reinterpret_cast<uintptr_t>(*at);
        if (tag == 1) packed = static_cast<const char*>(at[1]);  // ..._BUFFER_POINTER
        if (tag == 2) packed_bytes = *static_cast<size_t*>(at[1]);  // ..._BUFFER_SIZE
    }
    CHECK(params || packed || work.kernel->params.empty(), INVALID_VALUE)
    for (size_t i = 0; i < work.kernel->params.size(); ++i) {
        const auto [offset, bytes] = work.kernel->params[i];
        CHECK(!packed || offset + bytes <= packed_bytes, INVALID_VALUE)
        const char* from = packed ? packed + offset : static_cast<const char*>(params[i]);
        CHECK(from, INVALID_VALUE)
        work.params.emplace_back(from, from + bytes);
    }
    return SUCCESS;
}

Work copy_work(uint64_t target, uint64_t source, size_t bytes) {
    Work work;
    work.type = NODE_MEMCPY;
    work.memcpy.target.type = work.memcpy.source.type = 2;
    work.memcpy.target.device = target;
    work.memcpy.source.device = source;
    work.memcpy.width = bytes;
    work.memcpy.height = work.memcpy.depth = 1;
    return work;
}

Work set_work(uint64_t target, unsigned value, unsigned element_bytes, size_t count) {
    Work work;
    work.type = NODE_MEMSET;
    work.memset = {target, 0, value, element_bytes, count, 1};
    return work;
}

// ---------------------------------------------------------------------------------------------
// Streams and captures.

// What may not be called while this thread captures.
Status check_not_capturing() {
    bool refused = false;
    for (Capture* capture : driver().captures) {
        const bool ours = capture->thread == std::this_thread::get_id();
        if (capture->mode == CAPTURE_GLOBAL || (capture->mode == CAPTURE_THREAD_LOCAL && ours)) {
            capture->valid = false;
            refused = true;
        }
    }
    return refused ? STREAM_CAPTURE_UNSUPPORTED : SUCCESS;
}

Stream* default_stream() {
    static std::map<Context*, Stream*> streams;
    Stream*& stream = streams[current_context()];
    if (!stream) {
        stream = new Stream;
        stream->kind = "default stream";
        stream->context = current_context();
    }
    return stream;
}

Stream* find_stream(void* handle) {
    return reinterpret_cast<uintptr_t>(handle) <= 2 ? default_stream() : find<Stream>(handle);
}

// Do a node now, or record it where the stream is captured.
Status enqueue(void* stream_handle, Work work) {
    Stream* stream = find_stream(stream_handle);
    CHECK(stream && stream->context == current_context(), INVALID_HANDLE)
    if (!stream->capture) return run(work);
    CHECK(stream->capture->valid, STREAM_CAPTURE_INVALIDATED)
    std::vector<void*> before;
    for (Node* last : stream->last) before.push_back(static_cast<Object*>(last));
    void* added = nullptr;
    CHECKED(add_node(&added, static_cast<Object*>(stream->capture->graph), before.data(),
                     before.size(), std::move(work)))
    stream->last = {find<Node>(added)};
    return SUCCESS;
}

void abandon(Capture* capture) {
    for (Stream* stream : capture->streams) {
        stream->capture = nullptr;
        stream->last.clear();
    }
    driver().captures.erase(capture);
}

Status end_capture(Stream* stream, void** graph) {
    if (graph) *graph = nullptr;
    CHECK(stream->capture, INVALID_VALUE)
    Capture* capture = stream->capture;
    CHECK(capture->origin == stream, STREAM_CAPTURE_UNMATCHED)
    CHECK(capture->mode == CAPTURE_RELAXED || capture->thread == std::this_thread::get_id(),
          STREAM_CAPTURE_WRONG_THREAD)
    // What was captured on other streams must lead here.
    std::set<Node*> reached(stream->last);
    for (std::vector<Node*> todo(reached.begin(), reached.end()); !todo.empty();) {
        Node* node = todo.back();
        todo.pop_back();
        for (Node* before : node->before) {
            if (reached.insert(before).second) todo.push_back(before);
        }
    }
    bool joined = true;
    for (Stream* other : capture->streams) {
        for (Node* node : other->last) joined = joined && reached.count(node);
    }
    abandon(capture);
    if (capture->valid && joined) {
        if (graph) *graph = static_cast<Object*>(capture->graph);
        return SUCCESS;
    }
    const Status status = capture->valid ? STREAM_CAPTURE_UNJOINED : STREAM_CAPTURE_INVALIDATED;
    destroy(capture->graph);
    return status;
}

Status synchronize(Stream* stream) {
    CHECK(stream && stream->context == current_context(), INVALID_HANDLE)
    if (stream->capture) {
        stream->capture->valid = false;
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    return SUCCESS;
}

Context* primary_context(int device) {
    Context*& context = driver().primary[device];
    if (!context) {
        context = new Context(device, true);
        context->alive = false;
    }
    return context;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// For tests.

EXPORT int emulated_marker() { return 1; }

// What runs when a kernel of this name is launched; `setter` as `host_on_conditional`, or null.
EXPORT void emulated_register_kernel(const char* name, HostKernel code, SetConditionalHandler setter) {
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
EXPORT int emulated_faults_left() { return static_cast<int>(driver().faults.size()); }
EXPORT void emulated_forget_faults() { driver().faults.clear(); }

EXPORT void emulated_set_driver_version(int version) { driver().version = version; }
EXPORT void emulated_set_device_count(int count) { driver().devices = count; }
EXPORT void emulated_set_integrated(int integrated) { driver().integrated = integrated; }

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
    static const std::set<std::string> owned = {"context", "stream", "event", "library",
                                                "graph", "executable graph", "user object"};
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
        {1, 1024},                       // MAX_THREADS_PER_BLOCK
        {10, 32},                        // WARP_SIZE
        {16, 8},                         // MULTIPROCESSOR_COUNT
        {18, driver().integrated},       // INTEGRATED
        {19, 1},                         // CAN_MAP_HOST_MEMORY
        {41, 1},                         // UNIFIED_ADDRESSING
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
    CHECK(event && stream && stream->context == context && event->context == context, INVALID_HANDLE)
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
    auto* capture = new Capture{new Graph, stream, mode, std::this_thread::get_id(), true, {stream}};
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

EXPORT int cuLibraryLoadData(void** out, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
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

EXPORT int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** params, void** extra) {
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

EXPORT int cuGraphAddNode(void** out, void* graph, void** before, size_t n_before, NodeParams* params) {
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
        if (nodes[i] == node) nodes.erase(nodes.begin() + i);
        else nodes[i]->before.erase(node);
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

EXPORT int cuGraphRetainUserObject(void* graph_handle, void* handle, unsigned count, unsigned flags) {
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

EXPORT int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t, int* found);

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

EXPORT int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t, int* found) {
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
