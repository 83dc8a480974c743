// What benchmarks/kernels.py times: one pass over the weights of a GPT-2 of 124 M, its matrix products
// alone, and a plain read of the same bytes.
#include <chrono>
#include <memory>

#include "../src/octavo/generating/kernels.h"

using namespace octavo;

namespace {

struct Shape {
    int64_t rows, cols;
};
constexpr Shape LAYER[] = {{2304, 768}, {768, 768}, {3072, 768}, {768, 3072}}, HEAD = {50257, 768};
constexpr int LAYERS = 12;

struct Pass {
    const Kernels* kernels;
    Pool* pool;
    std::vector<Matrix> matrices;
    std::vector<unsigned char> memory;
    std::vector<float> x, y;
    std::vector<unsigned char> rounded;
    int64_t count;
    bool read;
    uint64_t seen = 0;
};

uint64_t read_all(const unsigned char* p, int64_t n) {  // four places at once, as the products do
    typedef uint64_t V __attribute__((vector_size(64), aligned(8)));
    V sums[4] = {};
    const int64_t each = n / 256;
    const V* at = (const V*)p;
    for (int64_t i = 0; i < each; i++)
        for (int s = 0; s < 4; s++) sums[s] += at[s * each + i];
    V all = sums[0] + sums[1] + sums[2] + sums[3];
    return all[0] + all[1] + all[2] + all[3] + all[4] + all[5] + all[6] + all[7];
}

void work(void* what, int thread) {
    Pass& pass = *(Pass*)what;
    const int threads = pass.pool->threads();
    uint64_t seen = 0;
    for (const Matrix& m : pass.matrices) {
        int64_t first, last;
        share(m.rows, thread, threads, &first, &last);
        if (pass.read) {
            const int64_t bytes = data_bytes(m.storage, m.group, m.rows, m.cols) + scale_bytes(m.storage, m.group, m.rows, m.cols);
            const int64_t from = bytes / 64 * thread / threads * 64, to = bytes / 64 * (thread + 1) / threads * 64;
            seen += read_all((const unsigned char*)m.data + from, to - from);
        } else {
            const Activations a{pass.count, m.cols, m.cols, pass.x.data(), pass.rounded.data()};
            pass.kernels->prepare(m, a, pass.count * thread / threads, pass.count * (thread + 1) / threads);
            pass.pool->barrier();
            pass.kernels->product(m, a, first, last, pass.y.data(), m.rows);
        }
        pass.pool->barrier();
    }
    __atomic_fetch_add(&pass.seen, seen, __ATOMIC_RELAXED);
}

}  // namespace

extern "C" {

// A pass with weights of its own, or null where this processor has not got these instructions.
Pass* open_pass(const char* isa, int threads, int storage, int group, int64_t count, int head) {
    const char* reason;
    const Kernels* kernels = pick(isa, &reason);
    if (!kernels) return nullptr;
    Pass* pass = new Pass;
    pass->kernels = kernels, pass->count = count, pass->pool = new Pool(threads);
    std::vector<Shape> shapes;
    for (int i = 0; i < LAYERS; i++) shapes.insert(shapes.end(), LAYER, LAYER + 4);
    if (head) shapes.push_back(HEAD);
    int64_t bytes = 0;
    auto size = [&](Shape s) { return round_up(data_bytes(storage, group, s.rows, s.cols), 64) + round_up(scale_bytes(storage, group, s.rows, s.cols), 64); };
    for (Shape s : shapes) bytes += size(s);
    pass->memory.resize(bytes + 64);
    uint64_t state = 1;
    auto random = [&] { return (state = state * 6364136223846793005u + 1442695040888963407u) >> 33; };
    unsigned char* at = pass->memory.data() + 64 - (uintptr_t)pass->memory.data() % 64;
    for (Shape s : shapes) {
        const int64_t data = data_bytes(storage, group, s.rows, s.cols), scales = scale_bytes(storage, group, s.rows, s.cols);
        unsigned char* scale = at + round_up(data, 64);
        for (int64_t i = 0; i < data / 4; i++) ((uint32_t*)at)[i] = storage == F32 ? 0x3c000000 + random() % 0x1000000 : storage == F16 ? 0x28002800 + random() % 0x400 * 0x10001 : random();
        for (int64_t i = 0; i < scales / 4; i++) ((uint32_t*)scale)[i] = storage == I8 ? 0x3a000000 : 0x24002400;
        pass->matrices.push_back({storage, group, s.rows, s.cols, at, scale});
        at += size(s);
    }
    pass->x.resize(count * 3072);
    for (float& x : pass->x) x = float(random() % 2000) / 1000 - 1;
    pass->y.resize(count * (head ? HEAD.rows : 3072));
    pass->rounded.resize(count * 16384);
    return pass;
}

void close_pass(Pass* pass) {
    delete pass->pool;
    delete pass;
}

int64_t pass_bytes(const Pass* pass) { return pass->memory.size(); }

// Seconds of one pass: the products, or a plain read.
double run_pass(Pass* pass, int read) {
    pass->read = read;
    auto start = std::chrono::steady_clock::now();
    pass->pool->run(work, pass);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}
