// The arithmetic of the native engine: matrix products over stored weights, attention, norms and
// activations, written once and compiled for each instruction set; and the pool of threads.
//
// Every number a token gets is the same, bit for bit, alone, in a batch or in a chunk of a prompt,
// and on any number of threads: a sum's order depends on the width of the row alone.
//
// How far products y = sum w x are from exact ones with the same dequantized weights, at n columns:
//   F32, F16  2^-24 (min(n, 1024)/W + n/1024 + 8) sum |w x|, with W lanes in a vector: 4, 8 or 16;
//   I8        x is rounded to 16 bits, x' = s rint(x/s) with s = max|x|/32767, the rest is exact:
//             0.504 s sum |w| + 2^-23 |y|. So int8 * fp32, whatever outliers a GELU lets through;
//   I4        x is rounded to 8 bits in each group, s = max|x in the group|/127:
//             0.504 sum over the groups (s sum |w|) + 2^-23 (groups + 2) sum |w x'|.
// I8 and I4 give the same bits on every instruction set; a NaN or an infinity spoils its whole token.
//
// Build with -O3 -std=c++17 -ffp-contract=off -pthread, and no -march: the instruction set is picked
// as it runs. The file includes itself once for each, with OCTAVO_TARGET naming it.
#ifndef OCTAVO_TARGET
#ifndef OCTAVO_KERNELS_H
#define OCTAVO_KERNELS_H

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
#include <sched.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace octavo {

// ---- what the engine hands to the kernels --------------------------------------------------------

enum Storage : int32_t { F32 = 0, F16 = 1, I8 = 2, I4 = 3 };

// Weights [rows = out][cols = in], at any address. F32 and F16 lie row by row. I8 and I4 lie in
// panels of 16 rows, missing rows and columns filled with zeros, so that a vector's lanes are rows:
//   I8  int8 [panel][pair of columns][16][2];            fp32 scales [row]
//   I4  uint8 [panel][group][8 columns of it][16][4];    fp16 scales [panel][group][16]
// An I4 byte holds q + 8 of column b below and of column b + 4 above; cols is a multiple of group.
struct Matrix {
    int32_t storage, group;
    int64_t rows, cols;
    const void *data, *scales;
};

constexpr int64_t PANEL = 16;
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The bytes of a matrix's data and of its scales.
inline int64_t data_bytes(int32_t storage, int64_t group, int64_t rows, int64_t cols) {
    if (storage < I8) return rows * cols * (storage == F32 ? 4 : 2);
    return round_up(rows, PANEL) * (storage == I8 ? round_up(cols, 2) : cols / group * round_up(group, 8) / 2);
}
inline int64_t scale_bytes(int32_t storage, int64_t group, int64_t rows, int64_t cols) {
    if (storage < I8) return 0;
    return round_up(rows, PANEL) * (storage == I8 ? 4 : cols / group * 2);
}

// What a product multiplies by: `count` tokens of `cols` floats, `stride` floats apart. For I8 and I4
// `rounded` is room for count * rounded_bytes(matrix), which `prepare` fills; it serves every matrix
// of the same storage, group and cols.
struct Activations {
    int64_t count, cols, stride;
    const float* values;
    unsigned char* rounded;
};

// I8: fp32 scale, 60 bytes unused, int16 [cols]. I4: fp32 scale [group], int32 -8 * sum [group],
// int8 [group][columns rounded up to 8]. Both end with room for a vector that writes past the end.
inline int64_t rounded_bytes(const Matrix& m) {
    if (m.storage == I8) return 64 + round_up(2 * m.cols, 64) + 64;
    if (m.storage == I4) return round_up(m.cols / m.group * (8 + round_up(m.group, 8)), 64) + 64;
    return 0;
}

// The keys and values of one key/value head, fp32 or fp16: keys [position / 16][head_dim][16], values
// [position][head_dim]. Each takes capacity * head_dim numbers; capacity is a multiple of 16.
struct Cache {
    int32_t storage;
    int64_t head_dim, capacity;
    void *keys, *values;
};

// Room, in floats, that `attend` needs where the last query sees `length` positions.
inline int64_t attend_room(int64_t length) { return 4 * round_up(length + 4, PANEL); }
enum Norm : int32_t { LAYERNORM = 0, RMSNORM = 1 };
enum Activation : int32_t { GELU = 0, GELU_TANH = 1, RELU = 2, RELU2 = 3, SILU = 4 };

// One instruction set's functions; `product` and all below it may run on many threads at once.
struct Kernels {
    const char* name;
    // Round the tokens [first, last) into a.rounded; nothing to do for F32 and F16.
    void (*prepare)(const Matrix& m, const Activations& a, int64_t first, int64_t last);
    // y[t * stride + r] = row r of m times token t, for the rows [first, last) and every token.
    // Fastest where first is a multiple of 16 (see `share`).
    void (*product)(const Matrix& m, const Activations& a, int64_t first, int64_t last, float* y, int64_t stride);
    // Row r as cols floats: the embedding of a token.
    void (*row)(const Matrix& m, int64_t r, float* out);
    // Store a position's key and value.
    void (*remember)(const Cache& cache, int64_t position, const float* key, const float* value);
    // `count` queries of one head, one position after another; the first sees `length` positions.
    // out = softmax(scale * query . keys) values; scratch holds attend_room(length + count - 1).
    void (*attend)(const Cache& cache, int64_t length, int64_t count, const float* queries, int64_t query_stride,
                   float scale, float* out, int64_t out_stride, float* scratch);
    // out = norm(x) * weight + bias; weight and bias may be null, out may be x.
    void (*norm)(int32_t kind, const float* x, const float* weight, const float* bias, float eps, int64_t n,
                 float* out);
    // x = f(x), or f(x) * up where up is not null.
    void (*activate)(int32_t kind, float* x, const float* up, int64_t n);
};

// A thread's share of the rows: whole panels, nearly equal.
inline void share(int64_t rows, int thread, int threads, int64_t* first, int64_t* last) {
    const int64_t panels = round_up(rows, PANEL) / PANEL;
    *first = std::min(panels * thread / threads * PANEL, rows);
    *last = std::min(panels * (thread + 1) / threads * PANEL, rows);
}

// ---- the threads ---------------------------------------------------------------------------------

// A fixed set of threads, of which the caller is number 0. `run` lets every thread do the same work,
// which may meet at `barrier`. Who waits spins a little, then yields; who has had no work for long
// sleeps. After a fork the child starts threads of its own. One `run` at a time.
class Pool {
public:
    using Work = void (*)(void* what, int thread);

    explicit Pool(int threads) : threads_(std::max(threads, 1)) { start(); }
    ~Pool() {
        if (state_->process != getpid()) return;
        state_->work = nullptr;
        next_job();
        for (std::thread& worker : state_->workers) worker.join();
        delete state_;
    }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    int threads() const { return threads_; }

    void run(Work work, void* what) {
        if (state_->process != getpid()) start();  // the threads, and who held which lock, stayed behind
        state_->work = work, state_->what = what;
        next_job();
        work(what, 0);
        barrier();
    }

    // Wait until all threads are here; what they wrote before, all see after.
    void barrier() {
        State& s = *state_;
        uint64_t round = s.round.load(std::memory_order_relaxed);
        if (s.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            s.arrived.store(0, std::memory_order_relaxed);
            s.round.store(round + 1, std::memory_order_release);
        } else {
            for (int tries = 0; s.round.load(std::memory_order_acquire) == round; tries++) wait(tries);
        }
    }

private:
    static constexpr int SPINS = 2000, YIELDS = 500;

    struct State {
        pid_t process = getpid();
        Work work = nullptr;  // null: it is over
        void* what = nullptr;
        std::mutex lock;
        std::condition_variable wake;
        std::vector<std::thread> workers;
        alignas(64) std::atomic<uint64_t> job{0};
        std::atomic<int> asleep{0};
        alignas(64) std::atomic<int> arrived{0};
        alignas(64) std::atomic<uint64_t> round{0};
    };

    void start() {
        state_ = new State;  // a forked child leaves the parent's behind: its threads do not exist here
        try {
            for (int i = 1; i < threads_; i++) state_->workers.emplace_back([this, i] { serve(i); });
        } catch (const std::system_error&) {
            threads_ = int(state_->workers.size()) + 1;  // the system gives no more
        }
    }

    void next_job() {
        {
            std::lock_guard<std::mutex> hold(state_->lock);
            state_->job.fetch_add(1, std::memory_order_release);
        }
        if (state_->asleep.load(std::memory_order_acquire)) state_->wake.notify_all();
    }

    void serve(int thread) {
        State& s = *state_;
        for (uint64_t seen = 0;; seen++) {
            await(s, seen);
            if (!s.work) return;
            s.work(s.what, thread);
            barrier();
        }
    }

    static void wait(int tries) {
        if (tries >= SPINS) sched_yield();
#if defined(__x86_64__)
        else _mm_pause();
#endif
    }

    static void await(State& s, uint64_t seen) {
        for (int tries = 0; tries < SPINS + YIELDS; tries++) {
            if (s.job.load(std::memory_order_acquire) != seen) return;
            wait(tries);
        }
        std::unique_lock<std::mutex> hold(s.lock);
        s.asleep.fetch_add(1, std::memory_order_release);
        s.wake.wait(hold, [&] { return s.job.load(std::memory_order_acquire) != seen; });
        s.asleep.fetch_sub(1, std::memory_order_release);
    }

    int threads_;
    State* state_ = nullptr;
};

}  // namespace octavo

// ---- the body, once for each instruction set -----------------------------------------------------

#define OCTAVO_TEXT_(name) #name
#define OCTAVO_TEXT(name) OCTAVO_TEXT_(name)
#define OCTAVO_PRAGMA_(...) _Pragma(#__VA_ARGS__)
#define OCTAVO_PRAGMA(...) OCTAVO_PRAGMA_(__VA_ARGS__)
#define OCTAVO_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define OCTAVO_UNROLL _Pragma("clang loop unroll(full)")
#define OCTAVO_BEGIN OCTAVO_PRAGMA(clang attribute push(__attribute__((target(OCTAVO_FEATURES))), apply_to = function))
#define OCTAVO_END _Pragma("clang attribute pop")
#else
#define OCTAVO_UNROLL _Pragma("GCC unroll 16")
#define OCTAVO_BEGIN _Pragma("GCC push_options") OCTAVO_PRAGMA(GCC target(OCTAVO_FEATURES))
#define OCTAVO_END _Pragma("GCC pop_options")
#endif

#define OCTAVO_TARGET 0
#include "kernels.h"
#if defined(__aarch64__)
#define OCTAVO_TARGET 1
#include "kernels.h"
#elif defined(__x86_64__)
#define OCTAVO_TARGET 2
#include "kernels.h"
#define OCTAVO_TARGET 3
#include "kernels.h"
#define OCTAVO_TARGET 4
#include "kernels.h"
#endif

namespace octavo {
// The fastest kernels this processor runs, or those called `forced`; null, and why in `reason`, where
// it has not got them.
inline const Kernels* pick(const char* forced, const char** reason) {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, features = 0, d = 0;
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __get_cpuid(1, &a, &b, &features, &d) && features & bit_F16C;
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    const std::pair<const Kernels*, bool> all[] = {
#if defined(__x86_64__)
        {&avx512vnni::kernels, avx512 && __builtin_cpu_supports("avx512vnni")},
        {&avx512::kernels, avx512},
        {&avx2::kernels, avx2},
#elif defined(__aarch64__)
        {&neon::kernels, true},
#endif
        {&scalar::kernels, true},
    };
    *reason = "no such instruction set in this build";
    for (auto [kernels, here] : all) {
        const bool asked = forced && *forced, named = asked && !std::strcmp(forced, kernels->name);
        if (here && (named || !asked)) return kernels;
        if (named) *reason = "this processor lacks these instructions";
    }
    return nullptr;
}

}  // namespace octavo
#endif  // OCTAVO_KERNELS_H

#else  // OCTAVO_TARGET

// No template of the standard library is used in here: what one region instantiates, another would
// call. Vectors are the compiler's own, so that + and * are written once.
#if OCTAVO_TARGET == 0
#define OCTAVO_NAME scalar
#elif OCTAVO_TARGET == 1
#define OCTAVO_NAME neon
#elif OCTAVO_TARGET == 2
#define OCTAVO_NAME avx2
#define OCTAVO_FEATURES "avx2,fma,f16c"
#elif OCTAVO_TARGET == 3
#define OCTAVO_NAME avx512
#define OCTAVO_FEATURES "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#else
#define OCTAVO_NAME avx512vnni
#define OCTAVO_FEATURES "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#endif
#if OCTAVO_TARGET >= 2
OCTAVO_BEGIN
#endif

namespace octavo::OCTAVO_NAME {

constexpr int W = OCTAVO_TARGET < 2 ? 4 : OCTAVO_TARGET == 2 ? 8 : 16;  // floats in a vector
constexpr int N = PANEL / W;                                            // vectors in 16 lanes

typedef float F __attribute__((vector_size(4 * W))), F4 __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(4 * W))), Four __attribute__((vector_size(16)));
typedef int16_t S __attribute__((vector_size(4 * W))), HalfS __attribute__((vector_size(2 * W)));
typedef int8_t HalfB __attribute__((vector_size(2 * W))), QuarterB __attribute__((vector_size(W)));

template <class V> OCTAVO_INLINE V read(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class V> OCTAVO_INLINE void put(void* p, const V& v) { __builtin_memcpy(p, &v, sizeof v); }
OCTAVO_INLINE F spread(float x) { return x - F{}; }
OCTAVO_INLINE I spread(int32_t x) { return x - I{}; }
OCTAVO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
template <class V> OCTAVO_INLINE V larger(V a, V b) { return a > b ? a : b; }  // b where one is NaN
OCTAVO_INLINE Four four(const I& v, int n) { return read<Four>((const char*)&v + 16 * n); }  // lanes 4n to 4n + 3

// ---- what differs between instruction sets
//   fma(a, b, c)         a * b + c
//   widen(half words)    fp16 to fp32, and narrow back
//   words(p)             int8 at p to int16; shrink<Q>(v), int32 to the int16 or int8 of Q
//   pairs(sum, w, x)     each lane of sum += w0 x0 + w1 x1, of int16
//   fours(sum, w, x)     the same of four nibbles (0 to 15) and four int8, into partial sums that
//                        hold 8 such additions; settle(sum, partial) adds those to lanes of int32
//   sums(a, b, c, d)     the four vectors' sums over their lanes

#if OCTAVO_TARGET == 0
OCTAVO_INLINE F fma(F a, F b, F c) { return a * b + c; }
OCTAVO_INLINE F widen(const uint16_t* p) {
    I h = __builtin_convertvector(read<HalfS>(p), I);
    I bits = (I)((F)((h & 0x7fff) << 13) * 0x1p112f);  // moves the exponent; subnormals too
    return (F)(bits | (I)(((h & 0x7c00) == 0x7c00) & 0x7f800000) | (h & 0x8000) << 16);
}
OCTAVO_INLINE void narrow(F x, uint16_t* p) {
    I sign = (I)x >> 16 & 0x8000, size = (I)x & 0x7fffffff;
    I normal = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;  // to nearest, ties to even
    I small = (I)((F)size + 0.5f) - 0x3f000000;                        // subnormal: the adder rounds
    I large = 0x7c00 | ((size > 0x7f800000) & 0x200);
    I half = size < 0x38800000 ? small : size < 0x47800000 ? normal : large;
    put(p, __builtin_convertvector(half | sign, HalfS));
}
OCTAVO_INLINE I words(const int8_t* p) { return (I)__builtin_convertvector(read<HalfB>(p), S); }
OCTAVO_INLINE I pairs(I sum, I w, I x) { return sum + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16); }
OCTAVO_INLINE I fours(I sum, I w, I x) {
    OCTAVO_UNROLL for (int b = 0; b < 32; b += 8) sum += (w >> b & 15) * (x << (24 - b) >> 24);
    return sum;
}
OCTAVO_INLINE I settle(I sum, I partial) { return sum + partial; }
OCTAVO_INLINE F4 sums(F a, F b, F c, F d) {
    return F4{a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]} +
           F4{a[2] + a[3], b[2] + b[3], c[2] + c[3], d[2] + d[3]};
}
template <class E> constexpr int FLOAT_TOKENS = 2;
constexpr int INT_PANELS = 1, INT_TOKENS = 2;

#elif OCTAVO_TARGET == 1
OCTAVO_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
OCTAVO_INLINE F widen(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
OCTAVO_INLINE void narrow(F x, uint16_t* p) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
OCTAVO_INLINE I words(const int8_t* p) { return (I)vmovl_s8(vld1_s8(p)); }
OCTAVO_INLINE I pairs(I sum, I w, I x) {
    int16x8_t a = (int16x8_t)w, b = (int16x8_t)x;
    return vaddq_s32((int32x4_t)sum, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
}
OCTAVO_INLINE I fours(I sum, I w, I x) {
    int8x16_t a = (int8x16_t)w, b = (int8x16_t)x;
    return (I)vaddq_s16((int16x8_t)sum, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
}
OCTAVO_INLINE I settle(I sum, I partial) { return vpadalq_s16((int32x4_t)sum, (int16x8_t)partial); }
OCTAVO_INLINE F4 sums(F a, F b, F c, F d) { return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)); }
template <class E> constexpr int FLOAT_TOKENS = 6;
constexpr int INT_PANELS = 1, INT_TOKENS = 4;

#elif OCTAVO_TARGET == 2
OCTAVO_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
OCTAVO_INLINE F widen(const uint16_t* p) { return _mm256_cvtph_ps(read<__m128i>(p)); }
OCTAVO_INLINE void narrow(F x, uint16_t* p) { put(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
OCTAVO_INLINE I words(const int8_t* p) { return (I)_mm256_cvtepi8_epi16(read<__m128i>(p)); }
OCTAVO_INLINE I pairs(I sum, I w, I x) { return sum + (I)_mm256_madd_epi16((__m256i)w, (__m256i)x); }
OCTAVO_INLINE I fours(I sum, I w, I x) { return (I)((S)sum + (S)_mm256_maddubs_epi16((__m256i)w, (__m256i)x)); }
OCTAVO_INLINE I settle(I sum, I partial) { return sum + (I)_mm256_madd_epi16((__m256i)partial, _mm256_set1_epi16(1)); }
OCTAVO_INLINE F4 sums(F a, F b, F c, F d) {
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
template <class Q> OCTAVO_INLINE Q shrink(I v) {
    __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    if constexpr (sizeof(Q) < sizeof(halves)) halves = _mm_packs_epi16(halves, halves);
    return read<Q>(&halves);
}
template <class E> constexpr int FLOAT_TOKENS = sizeof(E) == 4 ? 3 : 2;
constexpr int INT_PANELS = 1, INT_TOKENS = 4;

#else  // 3 and 4
OCTAVO_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
OCTAVO_INLINE F widen(const uint16_t* p) { return _mm512_cvtph_ps(read<__m256i>(p)); }
OCTAVO_INLINE void narrow(F x, uint16_t* p) { put(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
OCTAVO_INLINE I words(const int8_t* p) { return (I)_mm512_cvtepi8_epi16(read<__m256i>(p)); }
#if OCTAVO_TARGET == 3
OCTAVO_INLINE I pairs(I sum, I w, I x) { return sum + (I)_mm512_madd_epi16((__m512i)w, (__m512i)x); }
OCTAVO_INLINE I fours(I sum, I w, I x) { return (I)((S)sum + (S)_mm512_maddubs_epi16((__m512i)w, (__m512i)x)); }
OCTAVO_INLINE I settle(I sum, I partial) { return sum + (I)_mm512_madd_epi16((__m512i)partial, _mm512_set1_epi16(1)); }
#else
OCTAVO_INLINE I pairs(I sum, I w, I x) { return (I)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }
OCTAVO_INLINE I fours(I sum, I w, I x) { return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }
OCTAVO_INLINE I settle(I sum, I partial) { return sum + partial; }
#endif
OCTAVO_INLINE F4 sums(F a, F b, F c, F d) {
    F ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);  // a a b b, in fours of lanes
    F cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
    F all = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);  // a b c d
    all += _mm512_permute_ps(all, 0x4e);
    all += _mm512_permute_ps(all, 0xb1);
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all));
}
template <class E> constexpr int FLOAT_TOKENS = 6;
constexpr int INT_PANELS = 2, INT_TOKENS = 8;
#endif

#if OCTAVO_TARGET != 2
template <class Q> OCTAVO_INLINE Q shrink(I v) { return __builtin_convertvector(v, Q); }
#endif
OCTAVO_INLINE void narrow(F x, float* p) { put(p, x); }
OCTAVO_INLINE float sum(F a) { return sums(a, F{}, F{}, F{})[0]; }

// W numbers at p as floats, or the first n of them and zeros.
OCTAVO_INLINE F get(const float* p) { return read<F>(p); }
OCTAVO_INLINE F get(const uint16_t* p) { return widen(p); }
template <class E> OCTAVO_INLINE F get(const E* p, int64_t n) {
    if (n >= W) return get(p);
    E some[W] = {};
    for (int64_t i = 0; i < n; i++) some[i] = p[i];
    return get(some);
}
OCTAVO_INLINE void set(float* p, F x, int64_t n) {
    if (n >= W) return put(p, x);
    for (int64_t i = 0; i < n; i++) p[i] = x[i];
}

// exp(x) within 2 units in the last place; 0 below -87, infinity above 88; NaN stays NaN.
// n = rint(x / log 2) lands in the low bits of `shifted`; the rest is Taylor's series.
OCTAVO_INLINE F exponential(F x) {
    const float magic = 0x1.8p23f;
    x = x > 89.0f ? spread(89.0f) : x;
    F shifted = fma(x, spread(1.44269504f), spread(magic)), n = shifted - magic;
    F r = fma(n, spread(-0x1.62e4p-1f), x);
    r = fma(n, spread(-0x1.7f7d1cp-20f), r);  // the two add up to -log 2
    F y = spread(1.0f / 5040);
    const float inverse_factorials[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    OCTAVO_UNROLL for (float c : inverse_factorials) y = fma(y, r, spread(c));
    return x < -87.0f ? F{} : y * (F)(((I)shifted << 23) + 0x3f800000);
}

// ---- fp32 and fp16 rows: sums along the row

struct Job {
    const Matrix& m;
    const Activations& a;
    int64_t first, last;
    float* y;
    int64_t stride;
};

constexpr int64_t STREAMS = 4;     // places of the weights that one thread reads at once
constexpr int64_t COLUMNS = 1024;  // columns summed before their lanes are added up
constexpr int64_t BLOCK = 64;      // rows that stay in the second-level cache
constexpr int64_t FEW = 32;        // tokens that do, with STREAMS rows

struct Part {  // of a matrix: rows `apart` from each other, `each` times one after another, and some columns
    int64_t row, apart, each, from, to;
};

template <int R, int T, class E>
OCTAVO_INLINE void float_step(F (&acc)[4][T], const E* w, int64_t next, const float* x, int64_t stride, int64_t n) {
    F weights[R];
    OCTAVO_UNROLL for (int r = 0; r < R; r++) weights[r] = get(w + r * next, n);
    OCTAVO_UNROLL for (int t = 0; t < T; t++) {
        F values = get(x + t * stride, n);
        OCTAVO_UNROLL for (int r = 0; r < R; r++) acc[r][t] = fma(weights[r], values, acc[r][t]);
    }
}

// R rows times T tokens.
template <class E, int R, int T> static void float_tile(const Job& j, const Part& p, int64_t row, int64_t token) {
    const int64_t next = p.apart * j.m.cols, stride = j.a.stride;
    const E* w = (const E*)j.m.data + row * j.m.cols;
    const float* x = j.a.values + token * stride;
    F acc[4][T] = {};  // the rows beyond R stay zero
    int64_t k = p.from;
    for (; k + W <= p.to; k += W) float_step<R, T>(acc, w + k, next, x + k, stride, W);
    if (k < p.to) float_step<R, T>(acc, w + k, next, x + k, stride, p.to - k);
    OCTAVO_UNROLL for (int t = 0; t < T; t++) {
        F4 s = sums(acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
        float* y = j.y + (token + t) * j.stride + row;
        for (int r = 0; r < R; r++) y[r * p.apart] = p.from ? y[r * p.apart] + s[r] : s[r];
    }
}

template <class E, int R, int T> static void float_tokens(const Job& j, const Part& p, int64_t token) {
    for (; token + T <= j.a.count; token += T)
        for (int64_t i = 0; i < p.each; i++) float_tile<E, R, T>(j, p, p.row + i, token);
    if constexpr (T > 1)
        if (token < j.a.count) float_tokens<E, R, T / 2>(j, p, token);
}

template <class E, int R> static void float_rows(const Job& j, int64_t row, int64_t apart, int64_t each) {
    for (int64_t from = 0; from < j.m.cols; from += COLUMNS)
        float_tokens<E, R, FLOAT_TOKENS<E>>(j, {row, apart, each, from, least(from + COLUMNS, j.m.cols)}, 0);
}

// Few tokens: row after row in STREAMS distant places. Many: block after block of rows.
template <class E> static void float_product(const Job& j) {
    const bool few = j.a.count <= FEW;
    const int64_t block = few ? j.last - j.first : BLOCK;
    for (int64_t row = j.first; row < j.last; row += block) {
        const int64_t here = least(block, j.last - row), apart = here / STREAMS, each = few ? 1 : apart;
        for (int64_t i = 0; i < apart; i += each) float_rows<E, STREAMS>(j, row + i, apart, each);
        for (int64_t r = row + apart * STREAMS; r < row + here; r++) float_rows<E, 1>(j, r, 0, 1);
    }
}

// ---- int8 and int4 panels: the lanes are rows

// The loops of the innermost blocks: all vectors of P panels, all T tokens.
#define OCTAVO_PANELS OCTAVO_UNROLL for (int p = 0; p < P; p++) OCTAVO_UNROLL for (int n = 0; n < N; n++)
#define OCTAVO_TOKENS OCTAVO_UNROLL for (int t = 0; t < T; t++)

// An int32 lane takes two products a step: 2 * 127 * 32767 * 256 < 2^31, so 512 columns at a time.
struct Int8 {
    // P panels, `apart` from each other, times T tokens.
    template <int P, int T>
    static void tile(const Job& j, int64_t panel, int64_t apart, int64_t token, float (*y)[T][PANEL]) {
        const int64_t steps = (j.m.cols + 1) / 2, size = steps * 2 * PANEL, bytes = rounded_bytes(j.m);
        const int8_t* w = (const int8_t*)j.m.data + panel * size;
        const unsigned char* x = j.a.rounded + token * bytes;
        int64_t totals[P][T][PANEL] = {};
        for (int64_t from = 0; from < steps; from += 256) {
            I acc[P][T][N] = {};
            for (int64_t k = from; k < least(from + 256, steps); k++) {
                I weights[P][N];
                OCTAVO_PANELS weights[p][n] = words(w + p * apart * size + (k * N + n) * 2 * W);
                OCTAVO_TOKENS {
                    I values = spread(read<int32_t>(x + t * bytes + 64 + 4 * k));
                    OCTAVO_PANELS acc[p][t][n] = pairs(acc[p][t][n], weights[p][n], values);
                }
            }
            int32_t lanes[P][T][PANEL];
            put(lanes, acc);
            for (int p = 0; p < P; p++)
                for (int t = 0; t < T; t++)
                    for (int i = 0; i < PANEL; i++) totals[p][t][i] += lanes[p][t][i];
        }
        for (int p = 0; p < P; p++)
            for (int t = 0; t < T; t++) {
                const float* scales = (const float*)j.m.scales + (panel + p * apart) * PANEL;
                const double scale = read<float>(x + t * bytes);
                for (int i = 0; i < PANEL; i++)
                    y[p][t][i] = float(double(totals[p][t][i]) * (scale * double(read<float>(scales + i))));
            }
    }
};

// Within a group the sums are exact integers: q + 8 times x', less 8 times the sum of x'. Partial sums
// are settled every 32 columns, which are 8 additions of at most 2 * 15 * 127.
struct Int4 {
    template <int P, int T>
    static void tile(const Job& j, int64_t panel, int64_t apart, int64_t token, float (*y)[T][PANEL]) {
        const int64_t groups = j.m.cols / j.m.group, width = round_up(j.m.group, 8), bytes = rounded_bytes(j.m);
        const int64_t size = groups * width / 2 * PANEL;
        const uint8_t* w = (const uint8_t*)j.m.data + panel * size;
        const uint16_t* scales = (const uint16_t*)j.m.scales + panel * groups * PANEL;
        const unsigned char* x = j.a.rounded + token * bytes;
        F totals[P][T][N] = {};
        for (int64_t g = 0; g < groups; g++) {
            I acc[P][T][N];
            OCTAVO_TOKENS OCTAVO_PANELS acc[p][t][n] = spread(read<int32_t>(x + t * bytes + 4 * (groups + g)));
            for (int64_t from = 0; from < width; from += 32) {
                I partial[P][T][N] = {};
                for (int64_t k = from; k < least(from + 32, width); k += 8) {
                    I low[P][N], high[P][N];
                    OCTAVO_PANELS {
                        I both = read<I>(w + p * apart * size + (g * width + k) / 2 * PANEL + n * 4 * W);
                        low[p][n] = both & 0x0f0f0f0f;
                        high[p][n] = both >> 4 & 0x0f0f0f0f;
                    }
                    OCTAVO_TOKENS {
                        const unsigned char* values = x + t * bytes + 8 * groups + g * width + k;
                        I first = spread(read<int32_t>(values)), second = spread(read<int32_t>(values + 4));
                        OCTAVO_PANELS partial[p][t][n] = fours(partial[p][t][n], low[p][n], first);
                        OCTAVO_PANELS partial[p][t][n] = fours(partial[p][t][n], high[p][n], second);
                    }
                }
                OCTAVO_TOKENS OCTAVO_PANELS acc[p][t][n] = settle(acc[p][t][n], partial[p][t][n]);
            }
            OCTAVO_PANELS {
                F scale = get(scales + (p * apart * groups + g) * PANEL + n * W);
                OCTAVO_TOKENS {
                    F both = scale * read<float>(x + t * bytes + 4 * g);
                    totals[p][t][n] += __builtin_convertvector(acc[p][t][n], F) * both;
                }
            }
        }
        put(y, totals);
    }
};

template <class Q, int P, int T> static void panel_tokens(const Job& j, int64_t panel, int64_t apart, int64_t token) {
    for (; token + T <= j.a.count; token += T) {
        float lanes[P][T][PANEL];
        Q::template tile<P, T>(j, panel, apart, token, lanes);
        for (int p = 0; p < P; p++) {
            const int64_t row = (panel + p * apart) * PANEL, to = least(j.last - row, PANEL);
            for (int t = 0; t < T; t++)
                for (int64_t i = j.first > row ? j.first - row : 0; i < to; i++)
                    j.y[(token + t) * j.stride + row + i] = lanes[p][t][i];
        }
    }
    if constexpr (T > 1)
        if (token < j.a.count) panel_tokens<Q, P, T / 2>(j, panel, apart, token);
}

template <class Q, int P, int T> static void panels(const Job& j) {
    const int64_t first = j.first / PANEL, all = round_up(j.last, PANEL) / PANEL - first, apart = all / P;
    for (int64_t i = 0; i < apart; i++) panel_tokens<Q, P, T>(j, first + i, apart, 0);
    for (int64_t i = apart * P; i < all; i++) panel_tokens<Q, 1, T>(j, first + i, 0, 0);
}

static void product(const Matrix& m, const Activations& a, int64_t first, int64_t last, float* y, int64_t stride) {
    if (first >= last) return;
    const Job j{m, a, first, last, y, stride};
    switch (m.storage) {
        case F32: return float_product<float>(j);
        case F16: return float_product<uint16_t>(j);
        case I8: return a.count == 1 ? panels<Int8, STREAMS, 1>(j) : panels<Int8, INT_PANELS, INT_TOKENS>(j);
        default: return a.count == 1 ? panels<Int4, STREAMS, 1>(j) : panels<Int4, INT_PANELS, INT_TOKENS>(j);
    }
}

// Round the n floats at x to integers, the largest to `most`, and zeros up to width, as the numbers of
// the vector Q at q (it may write W - 1 more). Returns the scale, infinite or NaN where a number
// is; `total` gets the integers' sum.
template <class Q>
OCTAVO_INLINE float round_all(const float* x, int64_t n, int64_t width, float most, void* q, int32_t* total) {
    const float magic = 0x1.8p23f;  // whose last bit is worth 1: adding it rounds to nearest, ties to even
    I sizes{};
    for (int64_t k = 0; k < n; k += W) sizes = larger((I)get(x + k, n - k) & 0x7fffffff, sizes);
    Four top{};
    OCTAVO_UNROLL for (int i = 0; i < W / 4; i++) top = larger(four(sizes, i), top);
    const int32_t a = top[0] > top[1] ? top[0] : top[1], b = top[2] > top[3] ? top[2] : top[3], bits = a > b ? a : b;
    const bool tiny = bits < 0x10000000, finite = bits < 0x7f800000;  // tiny, below 2^-95: its inverse overflows
    const float largest = read<float>(&bits), inverse = tiny || !finite ? 0 : most / largest;
    I sum{};
    for (int64_t k = 0; k < width; k += W) {  // NaN has no integer: zeros in its place
        I integers = (I)(get(x + k, finite ? n - k : 0) * inverse + magic) - (I)spread(magic);
        sum += integers;
        put((char*)q + k * int64_t(sizeof(Q) / W), shrink<Q>(integers));
    }
    Four all{};
    OCTAVO_UNROLL for (int i = 0; i < W / 4; i++) all += four(sum, i);
    *total = all[0] + all[1] + all[2] + all[3];
    return tiny ? 0 : largest / most;
}

static void prepare(const Matrix& m, const Activations& a, int64_t first, int64_t last) {
    if (m.storage < I8) return;
    const int64_t whole = m.storage == I8, groups = whole ? 0 : m.cols / m.group, width = round_up(m.group, 8);
    for (int64_t t = first; t < last; t++) {
        const float* x = a.values + t * a.stride;
        unsigned char* out = a.rounded + t * rounded_bytes(m);
        int32_t total;
        if (whole) put(out, round_all<HalfS>(x, m.cols, m.cols + 1, 32767, out + 64, &total));
        for (int64_t g = 0; g < groups; g++) {
            unsigned char* q = out + 8 * groups + g * width;
            put(out + 4 * g, round_all<QuarterB>(x + g * m.group, m.group, width, 127, q, &total));
            put(out + 4 * (groups + g), -8 * total);
        }
    }
}

static void row(const Matrix& m, int64_t r, float* out) {
    const int64_t panel = r / PANEL, lane = r % PANEL, cols = m.cols;
    if (m.storage == F32) __builtin_memcpy(out, (const float*)m.data + r * cols, 4 * cols);
    if (m.storage == F16)
        for (int64_t k = 0; k < cols; k += W)
            set(out + k, get((const uint16_t*)m.data + r * cols + k, cols - k), cols - k);
    if (m.storage == I8) {
        const int8_t* w = (const int8_t*)m.data + panel * round_up(cols, 2) * PANEL + lane * 2;
        const float scale = read<float>((const float*)m.scales + r);
        for (int64_t k = 0; k < cols; k++) out[k] = w[k / 2 * 2 * PANEL + k % 2] * scale;
    }
    if (m.storage != I4) return;
    const int64_t groups = cols / m.group, width = round_up(m.group, 8);
    const uint8_t* w = (const uint8_t*)m.data + panel * groups * width / 2 * PANEL + lane * 4;
    for (int64_t g = 0; g < groups; g++) {
        const float scale = get((const uint16_t*)m.scales + (panel * groups + g) * PANEL + lane, 1)[0];
        for (int64_t i = 0; i < m.group; i++) {
            const int both = w[(g * width + i) / 8 * 4 * PANEL + i % 4];
            out[g * m.group + i] = ((i & 4 ? both >> 4 : both & 15) - 8) * scale;
        }
    }
}

// ---- attention: the lanes of a block of keys are 16 positions

template <class E> static void remember_as(const Cache& c, int64_t position, const float* key, const float* value) {
    E* keys = (E*)c.keys + position / PANEL * PANEL * c.head_dim + position % PANEL;
    E* values = (E*)c.values + position * c.head_dim;
    for (int64_t d = 0; d < c.head_dim; d += W) {
        const int64_t n = least(c.head_dim - d, W);
        E some[2][W];
        narrow(get(key + d, n), some[0]);
        narrow(get(value + d, n), some[1]);
        for (int64_t i = 0; i < n; i++) keys[(d + i) * PANEL] = some[0][i], values[d + i] = some[1][i];
    }
}

static void remember(const Cache& c, int64_t position, const float* key, const float* value) {
    (c.storage == F32 ? remember_as<float> : remember_as<uint16_t>)(c, position, key, value);
}

struct Look {  // the arguments of `attend`
    const Cache& c;
    const float* queries;
    int64_t query_stride, out_stride;
    float scale, *out, *scratch;
};

// Q queries times the keys of K blocks of 16 positions, scaled, into the scratch, `room` a query.
template <class E, int Q, int K> OCTAVO_INLINE void score(const Look& l, int64_t i, int64_t block, int64_t room) {
    const int64_t dim = l.c.head_dim;
    const E* keys = (const E*)l.c.keys + block * PANEL * dim;
    const float* queries = l.queries + i * l.query_stride;
    F acc[Q][K][N] = {};
    for (int64_t d = 0; d < dim; d++)
        OCTAVO_UNROLL for (int k = 0; k < K; k++)
            OCTAVO_UNROLL for (int n = 0; n < N; n++) {
                F key = get(keys + (k * dim + d) * PANEL + n * W);
                OCTAVO_UNROLL for (int q = 0; q < Q; q++)
                    acc[q][k][n] = fma(key, spread(queries[q * l.query_stride + d]), acc[q][k][n]);
            }
    for (int q = 0; q < Q; q++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < N; n++) put(l.scratch + q * room + (block + k) * PANEL + n * W, acc[q][k][n] * l.scale);
}

// The first `length` scores to exp(score - largest), the rest of the last 16 to 0; returns their sum.
OCTAVO_INLINE float soften(float* scores, int64_t length) {
    for (int64_t i = length; i < round_up(length, PANEL); i++) scores[i] = -__builtin_inff();
    F top = get(scores);
    for (int64_t i = W; i < length; i += W) top = larger(get(scores + i), top);
    float largest = top[0];
    for (int i = 1; i < W; i++) largest = top[i] > largest ? top[i] : largest;
    F total{};
    for (int64_t i = 0; i < length; i += W) {
        F weights = exponential(get(scores + i) - largest);
        total += weights;
        put(scores + i, weights);
    }
    return sum(total);
}

// acc[q][v] += weights[q][position] * values[position], from dimension d on, n of them in D vectors.
template <class E, int Q, int D>
OCTAVO_INLINE void gather(F (*acc)[D], const Cache& c, int64_t from, int64_t to, const float* weights, int64_t room,
                          int64_t d, int64_t n) {
    for (int64_t i = from; i < to; i++)
        OCTAVO_UNROLL for (int v = 0; v < D; v++) {
            F value = get((const E*)c.values + i * c.head_dim + d + v * W, n - v * W);
            OCTAVO_UNROLL for (int q = 0; q < Q; q++) acc[q][v] = fma(spread(weights[q * room + i]), value, acc[q][v]);
        }
}

// Q queries from the i-th on; the first of them sees `length` positions.
template <class E, int Q> static void attend_some(const Look& l, int64_t i, int64_t length) {
    constexpr int D = 4, K = Q == 1 || N == 1 ? 4 : 1;
    const int64_t blocks = round_up(length + Q - 1, PANEL) / PANEL, room = blocks * PANEL;
    int64_t b = 0;
    for (; b + K <= blocks; b += K) score<E, Q, K>(l, i, b, room);
    for (; b < blocks; b++) score<E, Q, 1>(l, i, b, room);
    float inverse[Q];
    for (int q = 0; q < Q; q++) inverse[q] = 1 / soften(l.scratch + q * room, length + q);
    for (int64_t d = 0; d < l.c.head_dim; d += D * W) {
        const int64_t n = l.c.head_dim - d;
        F acc[Q][D] = {};
        if (n >= D * W) gather<E, Q, D>(acc, l.c, 0, length, l.scratch, room, d, D * W);
        else gather<E, Q, D>(acc, l.c, 0, length, l.scratch, room, d, n);
        for (int q = 0; q < Q; q++) {
            gather<E, 1, D>(acc + q, l.c, length, length + q, l.scratch + q * room, room, d, n);
            float* out = l.out + (i + q) * l.out_stride + d;
            for (int v = 0; v < D && v * W < n; v++) set(out + v * W, acc[q][v] * inverse[q], n - v * W);
        }
    }
}

template <class E> static void attend_as(const Look& l, int64_t length, int64_t count) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) attend_some<E, 4>(l, i, length + i);
    for (; i < count; i++) attend_some<E, 1>(l, i, length + i);
}

static void attend(const Cache& c, int64_t length, int64_t count, const float* queries, int64_t query_stride,
                   float scale, float* out, int64_t out_stride, float* scratch) {
    const Look l{c, queries, query_stride, out_stride, scale, out, scratch};
    (c.storage == F32 ? attend_as<float> : attend_as<uint16_t>)(l, length, count);
}

// ---- norms and activations

static void norm(int32_t kind, const float* x, const float* weight, const float* bias, float eps, int64_t n,
                 float* out) {
    float mean = 0;
    F squares{};
    if (kind == LAYERNORM) {
        F total{};
        for (int64_t k = 0; k < n; k += W) total += get(x + k, n - k);
        mean = sum(total) / n;
    }
    int64_t k = 0;
    for (; k + W <= n; k += W) squares = fma(get(x + k) - mean, get(x + k) - mean, squares);
    for (; k < n; k++) squares[k % W] += (x[k] - mean) * (x[k] - mean);
    const float inverse = 1 / __builtin_sqrtf(sum(squares) / n + eps);
    for (k = 0; k < n; k += W) {
        F y = (get(x + k, n - k) - mean) * inverse;
        if (weight) y *= get(weight + k, n - k);
        if (bias) y += get(bias + k, n - k);
        set(out + k, y, n - k);
    }
}

// x times the normal distribution's integral, 1 - erfc(x / sqrt 2) / 2, by formula 7.1.26 of
// Abramowitz and Stegun (1964): |error| of erfc < 1.5e-7.
OCTAVO_INLINE F gelu(F x) {
    F z = (F)((I)x & 0x7fffffff) * 0.70710678f, t = 1 / fma(z, spread(0.3275911f), spread(1.0f));
    F p = spread(1.061405429f);
    const float coefficients[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    OCTAVO_UNROLL for (float c : coefficients) p = fma(p, t, spread(c));
    F tail = 0.5f * p * t * exponential(-z * z);
    return x * (x < 0 ? tail : 1 - tail);
}

// In GELU_TANH (1 + tanh u) / 2 = 1 / (1 + exp(-2u)).
OCTAVO_INLINE F activation(int32_t kind, F x) {
    switch (kind) {
        case GELU: return gelu(x);
        case GELU_TANH: return x / (1 + exponential(-1.59576912f * fma(0.044715f * x * x, x, x)));
        case RELU: return x < 0 ? F{} : x;
        case RELU2: return x < 0 ? F{} : x * x;
        default: return x / (1 + exponential(-x));
    }
}

static void activate(int32_t kind, float* x, const float* up, int64_t n) {
    for (int64_t k = 0; k < n; k += W) {
        F y = activation(kind, get(x + k, n - k));
        if (up) y *= get(up + k, n - k);
        set(x + k, y, n - k);
    }
}

static const Kernels kernels = {OCTAVO_TEXT(OCTAVO_NAME), prepare, product, row, remember, attend, norm, activate};

}  // namespace octavo::OCTAVO_NAME

#if OCTAVO_TARGET >= 2
OCTAVO_END
#endif
#undef OCTAVO_NAME
#undef OCTAVO_FEATURES
#undef OCTAVO_TARGET
#endif
