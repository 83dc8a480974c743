// Checks of src/octavo/generating/kernels.h that need no Python: as a program on every instruction set
// this processor has (so also under qemu, ASan, UBSan and TSan), as a library for test_kernels.py.
// Prints what it checked; exit code 1 at the first thing that is wrong.
#include <sys/resource.h>
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>

#include "../../src/octavo/generating/kernels.h"

using namespace octavo;

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif

namespace {

std::mt19937 generator(1337);

float uniform() { return std::uniform_real_distribution<float>(-1, 1)(generator); }

void check(bool good, const std::string& what) {
    if (good) return;
    std::printf("WRONG: %s\n", what.c_str());
    std::exit(1);
}

// The tokens times the matrix's rows [first, last), on `threads` threads.
void multiply(const Kernels& k, const Matrix& m, Activations a, int64_t first, int64_t last, float* y, int64_t stride, int threads) {
    std::vector<unsigned char> room(size_t(a.count * rounded_bytes(m)));
    a.rounded = room.data();
    struct Task {
        const Kernels& k;
        const Matrix& m;
        const Activations& a;
        int64_t first, last;
        float* y;
        int64_t stride;
        Pool pool;
    } task{k, m, a, first, last, y, stride, Pool(threads)};
    task.pool.run([](void* what, int thread) {
        Task& t = *(Task*)what;
        const int threads = t.pool.threads();
        t.k.prepare(t.m, t.a, t.a.count * thread / threads, t.a.count * (thread + 1) / threads);
        t.pool.barrier();
        int64_t from, to;
        share(t.last - t.first, thread, threads, &from, &to);
        t.k.product(t.m, t.a, t.first + from, t.first + to, t.y, t.stride);
    }, &task);
}

}  // namespace

extern "C" {

const Kernels* driver_pick(const char* isa, const char** reason) { return pick(isa, reason); }

void driver_product(const Kernels* k, const Matrix* m, const float* x, int64_t count, int64_t first, int64_t last, float* y, int threads) {
    multiply(*k, *m, {count, m->cols, m->cols, x, nullptr}, first, last, y, m->rows, threads);
}
void driver_row(const Kernels* k, const Matrix* m, int64_t r, float* out) { k->row(*m, r, out); }
void driver_norm(const Kernels* k, int kind, const float* x, const float* weight, const float* bias, float eps, int64_t n, float* out) {
    k->norm(kind, x, weight, bias, eps, n, out);
}
void driver_activate(const Kernels* k, int kind, float* x, const float* up, int64_t n) { k->activate(kind, x, up, n); }

// Keys and values (positions, head_dim) go into a cache, then `count` queries that see the last ones.
void driver_attend(const Kernels* k, int storage, int64_t head_dim, int64_t positions, int64_t count, const float* keys, const float* values,
                   const float* queries, float scale, float* out) {
    const int64_t capacity = round_up(positions, 16);
    std::vector<float> memory(size_t(2 * capacity * head_dim), NAN);  // what was never written must not count
    const Cache cache{storage, head_dim, capacity, memory.data(), memory.data() + capacity * head_dim};
    for (int64_t i = 0; i < positions; i++) k->remember(cache, i, keys + i * head_dim, values + i * head_dim);
    std::vector<float> scratch(size_t(attend_room(positions)));
    k->attend(cache, positions - count + 1, count, queries, head_dim, scale, out, head_dim, scratch.data());
}

}

namespace {

const char* const STORAGES[] = {"f32", "f16", "int8", "int4"};

struct Weights {  // at an odd multiple of 8 bytes, as a mapped file has them
    Matrix m;
    std::vector<unsigned char> data, scales;

    Weights(int32_t storage, int32_t group, int64_t rows, int64_t cols)
        : data(size_t(data_bytes(storage, group, rows, cols) + 72)), scales(size_t(scale_bytes(storage, group, rows, cols) + 72)) {
        unsigned char *d = data.data() + 8, *s = scales.data() + 8;
        m = {storage, group, rows, cols, d, s};
        const int64_t n = rows * cols;
        for (size_t i = 0; i < data.size() - 8; i++) d[i] = storage == I8 && (generator() & 255) == 128 ? 129 : uint8_t(generator());
        for (int64_t i = 0; i < n && storage == F32; i++) ((float*)d)[i] = uniform();
        for (int64_t i = 0; i < n && storage == F16; i++) ((uint16_t*)d)[i] = uint16_t((generator() & 0x83ff) | (0x2800 + (generator() & 0xc00)));
        for (int64_t i = 0; i < scale_bytes(storage, group, rows, cols) / 4; i++) {
            float scale = 0.01f + 0.01f * std::abs(uniform());
            uint16_t halves[2] = {uint16_t(0x2000 + (generator() & 0x7ff)), uint16_t(0x2000 + (generator() & 0x7ff))};
            std::memcpy(s + 4 * i, storage == I8 ? (void*)&scale : (void*)halves, 4);
        }
    }
};

// |error| of row w times token x, by the bounds in kernels.h.
double bound(const Kernels& k, const Matrix& m, const float* w, const float* x) {
    const std::string name = k.name;
    const int64_t lanes = name == "scalar" || name == "neon" ? 4 : name == "avx2" ? 8 : 16;
    double products = 0, rounding = 0;
    const int64_t group = m.storage == I8 ? m.cols : m.group;
    for (int64_t c = 0; c < m.cols; c++) products += std::abs(double(w[c]) * x[c]);
    if (m.storage < I8) return 0x1p-24 * (std::min<int64_t>(m.cols, 1024) / lanes + m.cols / 1024 + 8) * products;
    for (int64_t g = 0; g < m.cols; g += group) {
        double largest = 0, weights = 0;
        for (int64_t c = g; c < g + group; c++) largest = std::max(largest, std::abs(double(x[c]))), weights += std::abs(double(w[c]));
        rounding += 0.504 * largest / (m.storage == I8 ? 32767 : 127) * weights;
    }
    return rounding + 0x1p-23 * (m.cols / group + 2) * (products + rounding);
}

void check_product(const Kernels& k, int32_t storage, int32_t group, int64_t rows, int64_t cols, int64_t most) {
    const Weights weights(storage, group, rows, cols);
    const Matrix& m = weights.m;
    const std::string name = std::string(k.name) + " " + STORAGES[storage] + " " + std::to_string(rows) + " x " + std::to_string(cols) + " group " + std::to_string(group);
    std::vector<float> x(size_t(most * (cols + 3))), w(static_cast<size_t>(cols));
    for (float& value : x) value = uniform() * (generator() % 64 ? 1 : 50);  // with outliers, as after GELU
    std::vector<std::vector<float>> alone;
    for (int64_t t = 0; t < most; t++) {
        alone.emplace_back(size_t(rows));
        multiply(k, m, {1, cols, cols + 3, &x[size_t(t * (cols + 3))], nullptr}, 0, rows, alone.back().data(), rows, 1);
    }
    for (int64_t r = 0; r < rows; r += 1 + rows / 40) {
        k.row(m, r, w.data());
        for (int64_t t = 0; t < std::min<int64_t>(most, 3); t++) {
            double exact = 0;
            for (int64_t c = 0; c < cols; c++) exact += double(w[size_t(c)]) * x[size_t(t * (cols + 3) + c)];
            const double limit = bound(k, m, w.data(), &x[size_t(t * (cols + 3))]), error = std::abs(alone[size_t(t)][size_t(r)] - exact);
            check(error <= limit, name + ": row " + std::to_string(r) + " is off by " + std::to_string(error) + ", more than " + std::to_string(limit));
        }
    }
    for (int64_t count : {1, 2, 3, 5, 6, 7, 8, 13, 32, 33, 70, 256}) {
        if (count > most) break;
        const int threads = int(1 + count % 4);
        const int64_t first = count % 2 ? 0 : std::min<int64_t>(rows, 21), stride = rows + 5;
        std::vector<float> y(size_t(count * stride), -7);
        multiply(k, m, {count, cols, cols + 3, x.data(), nullptr}, first, rows, y.data(), stride, threads);
        for (int64_t t = 0; t < count; t++)
            for (int64_t r = 0; r < stride; r++) {
                const float expected = r < first || r >= rows ? -7 : alone[size_t(t)][size_t(r)];
                check(!std::memcmp(&y[size_t(t * stride + r)], &expected, 4), name + ": a batch of " + std::to_string(count) + " changes token " + std::to_string(t) + ", row " + std::to_string(r));
            }
    }
}

void check_products(const Kernels& k) {
    for (int32_t storage : {F32, F16, I8})
        for (auto [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {5, 7}, {16, 16}, {33, 65}, {50, 384}, {130, 768}, {17, 3077}}) check_product(k, storage, 0, rows, cols, 70);
    for (auto [rows, cols, group] : {std::tuple<int64_t, int64_t, int>{1, 4, 4}, {5, 21, 7}, {16, 45, 9}, {33, 90, 15}, {50, 384, 32}, {64, 768, 64}, {20, 768, 128}, {18, 3072, 32}, {34, 80, 16}, {40, 120, 40}})
        check_product(k, I4, group, rows, cols, 70);
    for (int32_t storage : {F32, F16, I8, I4}) check_product(k, storage, 32, 100, 96, 256);
    std::printf("%-10s products: within their bounds; equal bits alone, in batches of 2 to 256, on 1 to 4 threads, off alignment\n", k.name);
}

void check_largest(const Kernels& k) {
    for (int64_t cols : {512, 514, 768, 3072, 6400})
        for (int sign : {1, -1}) {
            std::vector<int8_t> w(size_t(16 * cols), int8_t(127 * sign));
            std::vector<uint8_t> nibbles(size_t(16 * cols), sign > 0 ? 0xff : 0x00);
            std::vector<float> x(size_t(cols), 2), y(16), scales(16, 0.5f);
            std::vector<uint16_t> halves(size_t(16 * (cols / 2)), 0x3800);
            multiply(k, {I8, 0, 16, cols, w.data(), scales.data()}, {1, cols, cols, x.data(), nullptr}, 0, 16, y.data(), 16, 1);
            const float s = 2.0f / 32767, expected = float(double(cols * 127 * 32767 * sign) * (double(s) * 0.5));
            for (float value : y) check(value == expected, std::string(k.name) + " int8: the largest sums wrap at " + std::to_string(cols) + " columns");
            for (int group : {int(cols / 2), 32}) {
                if (cols % group) continue;
                multiply(k, {I4, group, 16, cols, nibbles.data(), halves.data()}, {1, cols, cols, x.data(), nullptr}, 0, 16, y.data(), 16, 1);
                const double sum = double(cols) * (sign > 0 ? 7 : -8);
                for (float value : y) check(std::abs(value - sum) < 1e-5 * std::abs(sum), std::string(k.name) + " int4: the largest sums wrap at " + std::to_string(cols) + " columns");
            }
        }
    std::printf("%-10s int8 and int4: the largest weights times the largest activations, 512 to 6,400 columns\n", k.name);
}

void check_nonfinite(const Kernels& k) {
    for (int32_t storage : {F32, F16, I8, I4})
        for (float bad : {NAN, INFINITY, -INFINITY})
            for (int64_t at : {0, 37, 95}) {
                const Weights weights(storage, 32, 20, 96);
                std::vector<float> x(192, 0.5f), y(40);
                x[size_t(96 + at)] = bad;
                multiply(k, weights.m, {2, 96, 96, x.data(), nullptr}, 0, 20, y.data(), 20, 1);
                for (size_t i = 0; i < 40; i++) check(std::isfinite(y[i]) == (i < 20), std::string(k.name) + " " + STORAGES[storage] + ": a NaN or infinity is hidden, or spreads");
            }
    std::printf("%-10s NaN and infinity come out, and stay in their token\n", k.name);
}

void check_attend(const Kernels& k) {
    for (int storage : {F32, F16})
        for (int64_t dim : {1, 7, 16, 20, 64, 80, 128})
            for (int64_t positions : {1, 15, 16, 17, 70, 300}) {
                const int64_t count = std::min<int64_t>(positions, 11);
                std::vector<float> keys(size_t(positions * dim)), values(keys.size()), queries(size_t(count * dim)), together(queries.size()), alone(static_cast<size_t>(dim));
                for (auto* all : {&keys, &values, &queries})
                    for (float& value : *all) value = std::round(uniform() * 512) / 256;  // exact in fp16
                driver_attend(&k, storage, dim, positions, count, keys.data(), values.data(), queries.data(), 0.3f, together.data());
                for (int64_t q = 0; q < count; q++) {
                    const int64_t length = positions - count + 1 + q;
                    driver_attend(&k, storage, dim, length, 1, keys.data(), values.data(), &queries[size_t(q * dim)], 0.3f, alone.data());
                    check(!std::memcmp(&together[size_t(q * dim)], alone.data(), size_t(4 * dim)), std::string(k.name) + ": attention differs beside other queries");
                    std::vector<double> weights;
                    double total = 0;
                    for (int64_t i = 0; i < length; i++) {
                        double dot = 0;
                        for (int64_t d = 0; d < dim; d++) dot += double(queries[size_t(q * dim + d)]) * keys[size_t(i * dim + d)];
                        weights.push_back(std::exp(double(0.3f) * dot));
                        total += weights.back();
                    }
                    for (int64_t d = 0; d < dim; d++) {
                        double exact = 0;
                        for (int64_t i = 0; i < length; i++) exact += weights[size_t(i)] / total * values[size_t(i * dim + d)];
                        check(std::abs(alone[size_t(d)] - exact) < 4e-6, std::string(k.name) + ": attention over " + std::to_string(length) + " positions is off by " + std::to_string(alone[size_t(d)] - exact));
                    }
                }
            }
    std::printf("%-10s attention: exact to 4e-6; equal bits for one query and several\n", k.name);
}

void check_pool() {
    struct Shared {
        Pool& pool;
        std::vector<int64_t> cells;
        int rounds;
    };
    const Pool::Work work = [](void* what, int thread) {
        Shared& s = *(Shared*)what;
        const size_t n = s.cells.size();
        for (int i = 0; i < s.rounds; i++) {
            const int64_t next = s.cells[(size_t(thread) + 1) % n] + 1;
            s.pool.barrier();
            s.cells[size_t(thread)] = next;
            s.pool.barrier();
        }
    };
    auto run = [&](Pool& pool, int rounds) {
        Shared shared{pool, std::vector<int64_t>(size_t(pool.threads())), rounds};
        pool.run(work, &shared);
        for (int64_t cell : shared.cells) check(cell == rounds, "a barrier lets a thread pass early");
    };
    for (int i = 0; i < 1000; i++) {
        Pool pool(1 + i % 4);
        if (i % 3) run(pool, i % 5);
    }
    Pool pool(9);
    for (int i = 0; i < 20; i++) run(pool, 50);
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    getrusage(RUSAGE_SELF, &after);
    check(after.ru_utime.tv_sec * 1000000 + after.ru_utime.tv_usec - before.ru_utime.tv_sec * 1000000 - before.ru_utime.tv_usec < 100000, "idle threads burn the processor");
    run(pool, 20);
    std::printf("pool       1,000 pools started and stopped; 9 threads meet in order, sleep when idle, wake\n");
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)  // TSan and qemu cannot fork beside threads
    const pid_t child = fork();
    if (!child) {
        alarm(60);
        run(pool, 20);
        pool.~Pool();
        _exit(0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    check(status == 0, "a forked child cannot use the pool");
    std::printf("pool       a forked child has threads of its own\n");
#endif
}

}  // namespace

int main(int argc, char** argv) {
    const char* reason = "";
    check(!pick("mmx", &reason) && *reason, "an unknown instruction set is refused, with a reason");
    for (const char* isa : {"scalar", "neon", "avx2", "avx512", "avx512vnni"}) {
        const Kernels* k = pick(isa, &reason);
        if (argc > 1 && std::find_if(argv + 1, argv + argc, [&](char* name) { return !std::strcmp(name, isa); }) == argv + argc) continue;
        if (!k) {
            std::printf("%-10s not here: %s\n", isa, reason);
            continue;
        }
        check_products(*k);
        check_largest(*k);
        check_nonfinite(*k);
        check_attend(*k);
    }
    check_pool();
}
