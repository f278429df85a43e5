// What the emulated driver knows, and how it runs work. No entry point is here, and no check of
// what the caller may do beyond what the work itself needs.

#pragma once

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

#include "abi.h"

namespace {

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
    if (end != std::string::npos &&
        text.find_first_not_of("0123456789", end + 2) == std::string::npos) {
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
#define NEEDS_CONTEXT                            \
    CHECK(driver().initialized, NOT_INITIALIZED) \
    Context* const context = current_context();  \
    CHECK(context, INVALID_CONTEXT)              \
    CHECK(context->alive, CONTEXT_IS_DESTROYED)

Context* current_context() {
    return context_stack.empty() ? nullptr : context_stack.back();
}

void problem(const std::string& text) {
    driver().problems.push_back(text);
}

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
    CHECK(image && std::memcmp(image,
                               "\x7f"
                               "ELF",
                               4) == 0,
          INVALID_IMAGE)
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
        if (node->work.child)
            made->work.child = clone(node->work.child, "part of a graph", copy->root);
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
        if (tag == 1) packed = static_cast<const char*>(at[1]);     // ..._BUFFER_POINTER
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
