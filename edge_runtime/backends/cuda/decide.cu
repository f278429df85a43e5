// One exit judged on the device: label, signal, confidence, and whether the sample leaves here.
//
// It follows edge_runtime/confidence.py number by number and edge_runtime/policy.py rule by rule;
// decide.py has the same structs for numpy, and a twin of the kernel. It includes nothing, so that
// NVRTC needs no headers; the tests run it on the CPU too.

#ifdef __CUDACC__
#if defined(__CUDACC_RTC__) && defined(GRAPH_CONDITIONALS)
// The runtime's own header declares it so; NVRTC knows the symbol and needs no device library.
typedef unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ __cudart_builtin__ void CUDARTAPI
cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);
#endif

__device__ unsigned long long globaltimer() {
    unsigned long long nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
}
#endif

enum { THREADS = 256, FOLDS = 16, RECORD_WORDS = 8 };
enum { MAX_SOFTMAX, ENTROPY, SOFTMAX_MARGIN, LOGITS_MARGIN };
enum { CONFIDENT = 1, LAST = 2, DEADLINE = 4, NOT_FINITE = 8 };

// The rule of one exit.
struct Rule {
    float threshold;
    float temperature;
    int metric;
    int repeat;    // 1: an exit fires by repeating the label before it, 0: by its threshold
    int patience;  // how many exits in a row must fire
    int spare[3];
};

// Comes with every frame.
struct Control {
    unsigned sequence;
    unsigned deepest;  // from this exit on, a sample leaves whatever its signal
    unsigned samples;
    unsigned spare;
};

// What a sample carries from exit to exit.
struct State {
    int label;
    int streak;
};

// The extremes of some logits; NaN counts as larger than any number, as in numpy's argmax.
struct Extremes {
    float largest, second, smallest;
    int label;
};

struct Sums {
    float total, weighted;
};

__device__ float to_float(float value) { return value; }

// A half, given by its bits; every half is exact as a float.
__device__ float to_float(unsigned short half) {
    const unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u;
    const unsigned mantissa = half & 0x3ffu;
    if (exponent == 0) {
        const float steps = 5.9604644775390625e-8f * mantissa;  // of 2^-24
        return __uint_as_float(sign | __float_as_uint(steps));
    }
    const unsigned widened = exponent == 31 ? 255 : exponent + 112;
    return __uint_as_float(sign | widened << 23 | mantissa << 13);
}

__device__ bool above(float a, float b) { return a > b || (a != a && b == b); }

// The lowest label wins a tie, so that the order of merging does not matter.
__device__ Extremes merge(Extremes a, Extremes b) {
    const bool b_wins = above(b.largest, a.largest) ||
                        (!above(a.largest, b.largest) && b.label < a.label);
    const Extremes& won = b_wins ? b : a;
    const Extremes& lost = b_wins ? a : b;
    return {won.largest, lost.largest > won.second ? lost.largest : won.second,
            b.smallest < a.smallest ? b.smallest : a.smallest, won.label};
}

__device__ Sums merge(Sums a, Sums b) { return {a.total + b.total, a.weighted + b.weighted}; }

// Merge what the threads of a block have, in a fixed order; every thread gets the result.
template <typename Part>
__device__ Part reduce(Part own, Part (&parts)[THREADS], Part (&folds)[FOLDS]) {
    const int thread = threadIdx.x;
    parts[thread] = own;
    __syncthreads();
    if (thread < FOLDS) {
        Part fold = parts[thread];
        for (int i = thread + FOLDS; i < THREADS; i += FOLDS) fold = merge(fold, parts[i]);
        folds[thread] = fold;
    }
    __syncthreads();
    Part whole = folds[0];
    for (int i = 1; i < FOLDS; ++i) whole = merge(whole, folds[i]);
    return whole;
}

template <typename T>
__device__ Extremes find_extremes(const T* logits, int classes) {
    __shared__ Extremes parts[THREADS], folds[FOLDS];
    const float infinity = __uint_as_float(0x7f800000u);
    Extremes found = {-infinity, -infinity, infinity, 0x7fffffff};
    for (int i = threadIdx.x; i < classes; i += THREADS) {
        const float value = to_float(logits[i]);
        found = merge(found, Extremes{value, -infinity, value, i});
    }
    return reduce(found, parts, folds);
}

// Sums of exp(x) and exp(x) * x over the shifted logits.
template <typename T>
__device__ Sums find_sums(const T* logits, int classes, float largest, float temperature) {
    __shared__ Sums parts[THREADS], folds[FOLDS];
    Sums sums = {0, 0};
    for (int i = threadIdx.x; i < classes; i += THREADS) {
        const float shifted = (to_float(logits[i]) - largest) / temperature;
        const float exponent = expf(shifted);
        sums = merge(sums, Sums{exponent, exponent * shifted});
    }
    return reduce(sums, parts, folds);
}

// Whether all logits are finite and a float holds their softmax: NaN makes a comparison false.
__device__ bool fits(Extremes extremes, float temperature) {
    const double most = 3.4028234663852886e38;
    const double spread = (double)extremes.largest - (double)extremes.smallest;
    return spread <= most && spread / (double)temperature <= most;
}

__device__ float signal_of(int metric, Extremes extremes, Sums sums, float temperature) {
    if (metric == MAX_SOFTMAX) return 1 / sums.total;
    if (metric == ENTROPY) return sums.weighted / sums.total - logf(sums.total);
    const float second = (extremes.second - extremes.largest) / temperature;
    return metric == LOGITS_MARGIN ? -second : (1 - expf(second)) / sums.total;
}

// The host reads this memory while the kernel runs. Each word is stored at once and says which
// frame it belongs to, so that words need no order among each other.
__device__ void put(unsigned long long* word, unsigned payload, unsigned sequence) {
    *(volatile unsigned long long*)word = (unsigned long long)payload << 32 | sequence;
}

// Judge the sample of this block; thread 0 returns its status, 0 where the sample goes on.
template <typename T>
__device__ unsigned judge(const T* logits, int classes, const Rule* rule, const Control* control,
                          State* state, unsigned long long* record, unsigned long long* answer,
                          int exit, int first, int last) {
    const unsigned sample = blockIdx.x;
    if (sample >= control->samples) return LAST;

    logits += (unsigned long long)sample * classes;
    const float temperature = rule->temperature;
    const Extremes extremes = find_extremes(logits, classes);
    const Sums sums = find_sums(logits, classes, extremes.largest, temperature);
    if (threadIdx.x != 0) return 0;

    const bool finite = fits(extremes, temperature);
    const float signal = finite ? signal_of(rule->metric, extremes, sums, temperature) : 0;
    const float confidence = finite ? 1 / sums.total : 0;

    const State before = state[sample];
    const bool repeats = !first && extremes.label == before.label;
    const bool fires = finite && (rule->repeat ? repeats : signal >= rule->threshold);
    const int streak = fires ? (first ? 0 : before.streak) + 1 : 0;
    state[sample] = State{extremes.label, streak};

    unsigned status = 0;
    if (!finite) {
        status = NOT_FINITE;
    } else if (last) {
        status = LAST;
    } else if (streak >= rule->patience) {
        status = CONFIDENT;
    } else if ((unsigned)exit >= control->deepest) {
        status = DEADLINE;
    }

    const unsigned sequence = control->sequence;
    unsigned long long* words = record + (unsigned long long)sample * RECORD_WORDS;
    put(words + 0, extremes.label, sequence);
    put(words + 1, __float_as_uint(signal), sequence);
    put(words + 2, __float_as_uint(confidence), sequence);
    put(words + 3, status, sequence);
    put(words + 4, (unsigned)globaltimer(), sequence);
    for (int spare = 5; spare < RECORD_WORDS; ++spare) put(words + spare, 0, sequence);
    if (status != 0 && answer && sample == 0) {
        __threadfence_system();
        put(answer, exit, sequence);
    }
    return status;
}

#define ARGUMENTS(T)                                                                       \
    const T *logits, int classes, const Rule *rule, const Control *control, State *state, \
        unsigned long long *record, unsigned long long *answer, int exit, int first, int last
#define JUDGE judge(logits, classes, rule, control, state, record, answer, exit, first, last)

extern "C" __global__ void decide_float32(ARGUMENTS(float)) { JUDGE; }
extern "C" __global__ void decide_float16(ARGUMENTS(unsigned short)) { JUDGE; }

#ifdef GRAPH_CONDITIONALS
// A graph has a batch of one: its only sample decides whether the next stage runs.
__device__ void go_on(unsigned status, cudaGraphConditionalHandle next) {
    if (blockIdx.x == 0 && threadIdx.x == 0 && status == 0) cudaGraphSetConditional(next, 1);
}

extern "C" __global__ void decide_float32_next(ARGUMENTS(float), unsigned long long next) {
    go_on(JUDGE, next);
}
extern "C" __global__ void decide_float16_next(ARGUMENTS(unsigned short), unsigned long long next) {
    go_on(JUDGE, next);
}
#endif
