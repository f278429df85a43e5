// CUDA kernels on the CPU, for tests only: put before a .cu of the subset that our kernels use, it
// lets a C++ compiler make host code of it.
//
// Blocks run one after another. The threads of a block are fibres that take turns at
// __syncthreads, in changing order, so that a kernel that lacks a barrier gives wrong numbers here
// too. Several host threads may run kernels at the same time. Included once per library, whose own
// all variables are.

#pragma once

#include <ucontext.h>

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__ static
// All fibres of a block live on one host thread.
#define __shared__ static thread_local

typedef unsigned long long cudaGraphConditionalHandle;

namespace cuda_on_host {

struct Dimensions {
    unsigned x, y, z;
};

struct Setting {
    cudaGraphConditionalHandle handle;
    unsigned value;
};

typedef void (*ConditionalHandler)(cudaGraphConditionalHandle handle, unsigned value);
static ConditionalHandler conditional_handler = nullptr;

constexpr std::size_t STACK_BYTES = 64 * 1024;

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    bool done;
};

// What one host thread needs to run blocks; stacks are used again by the next block.
struct Machine {
    std::vector<std::unique_ptr<Fibre>> fibres;
    ucontext_t caller;
    Fibre* running = nullptr;
    std::function<void()> body;
    std::vector<Setting> settings;
};

static thread_local Machine machine;

}  // namespace cuda_on_host

static thread_local cuda_on_host::Dimensions threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
static thread_local cuda_on_host::Dimensions blockDim{1, 1, 1}, gridDim{1, 1, 1};

namespace cuda_on_host {

inline void fibre_main() {
    machine.body();
    machine.running->done = true;
}

inline void start(Fibre& fibre) {
    fibre.done = false;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = STACK_BYTES;
    fibre.context.uc_link = &machine.caller;
    makecontext(&fibre.context, fibre_main, 0);
}

// Let one thread of the block run to its next barrier or its end; says whether it goes on.
inline bool resume(unsigned thread) {
    Fibre& fibre = *machine.fibres[thread];
    if (fibre.done) return false;
    threadIdx.x = thread;
    machine.running = &fibre;
    swapcontext(&machine.caller, &fibre.context);
    return !fibre.done;
}

inline void run_block(unsigned threads) {
    while (machine.fibres.size() < threads) machine.fibres.push_back(std::make_unique<Fibre>());
    for (unsigned i = 0; i < threads; ++i) start(*machine.fibres[i]);
    bool forward = true;
    for (bool any = true; any; forward = !forward) {
        any = false;
        for (unsigned i = 0; i < threads; ++i) any |= resume(forward ? i : threads - 1 - i);
    }
}

template <typename... Args, std::size_t... I>
void run_unpacked(void (*kernel)(Args...), void** params, unsigned grid, unsigned block,
                  std::index_sequence<I...>) {
    // As at a launch: arguments are copied, whatever the kernel overwrites.
    const std::tuple<Args...> arguments{*static_cast<Args*>(params[I])...};
    machine.body = [kernel, &arguments] { std::apply(kernel, arguments); };
    blockDim.x = block;
    gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) run_block(block);
    // Only now: the handler gets the host's own stack, a fibre's is small.
    std::vector<Setting> settings;
    settings.swap(machine.settings);
    for (const Setting& setting : settings) {
        if (conditional_handler) conditional_handler(setting.handle, setting.value);
    }
}

// Run a kernel to its end; `params` points at each argument, as for cuLaunchKernel.
template <typename... Args>
void run_kernel(void (*kernel)(Args...), void** params, unsigned grid, unsigned block) {
    run_unpacked(kernel, params, grid, block, std::index_sequence_for<Args...>{});
}

}  // namespace cuda_on_host

static inline void __syncthreads() {
    cuda_on_host::Fibre* self = cuda_on_host::machine.running;
    swapcontext(&self->context, &cuda_on_host::machine.caller);
}

static inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The device's %globaltimer: nanoseconds.
static inline unsigned long long globaltimer() {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

static inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
    cuda_on_host::machine.settings.push_back({handle, value});
}

// Whom cudaGraphSetConditional tells, after the kernel; null for nobody.
extern "C" void host_on_conditional(cuda_on_host::ConditionalHandler handler) {
    cuda_on_host::conditional_handler = handler;
}

// Export a kernel as host_NAME.
#define HOST_KERNEL(name)                                                              \
    extern "C" void host_##name(void** params, unsigned grid, unsigned block) {        \
        cuda_on_host::run_kernel(name, params, grid, block);                           \
    }
