// The native engine without Python, for ASan, UBSan and TSan: a tiny model with odd widths in every
// storage writes on several threads, prompts in chunks, rows side by side, windows that move, drafts.
// Prints the ids; they must not depend on threads, chunks or neighbours.
#include "../../src/octavo/generating/native.cpp"

#include <cstdio>
#include <deque>

using namespace octavo;

namespace {

uint64_t drawn = 0;
float number() { return static_cast<float>(uniform(7, 0, drawn++)) - 0.5f; }

struct Weights {
    std::deque<std::vector<char>> memory;  // never moves

    template <class Number>
    Number* take(int64_t count) {
        memory.emplace_back(count * sizeof(Number));
        return reinterpret_cast<Number*>(memory.back().data());
    }
    const float* floats(int64_t count) {
        float* all = take<float>(count);
        for (int64_t i = 0; i < count; i++) all[i] = number();
        return all;
    }
    Matrix matrix(int32_t storage, int32_t group, int64_t rows, int64_t cols) {
        int64_t bytes = data_bytes(storage, group, rows, cols), scales = scale_bytes(storage, group, rows, cols);
        Matrix m{storage, group, rows, cols, nullptr, nullptr};
        if (storage == F32) {
            m.data = floats(rows * cols);
            return m;
        }
        auto* data = take<unsigned char>(bytes);
        for (int64_t i = 0; i < bytes; i++) data[i] = static_cast<unsigned char>(splitmix64(3, drawn++));
        if (storage == F16)  // halves of moderate size: sign, exponents of 1/8 and 1/4, any fraction
            for (int64_t i = 1; i < bytes; i += 2) data[i] = (data[i] & 0x87) | 0x30;
        m.data = data;
        m.scales = take<char>(scales + 1);
        if (storage == I8) std::fill_n((float*)m.scales, scales / 4, 0.002f);
        if (storage == I4) std::fill_n((uint16_t*)m.scales, scales / 2, uint16_t{0x2800});  // 1/32
        return m;
    }
    Linear linear(int32_t storage, int64_t rows, int64_t cols) {
        return {matrix(storage, storage == I4 ? static_cast<int32_t>(cols / 2) : 0, rows, cols), floats(rows)};
    }
};

using Texts = std::vector<std::vector<int32_t>>;

Texts write(const Model& model, int32_t cache, int threads, int chunk, bool together, bool drafts) {
    std::atomic<int32_t> cancel{0};
    Settings settings{3, 30, threads, cache, chunk, 1 << 24, &cancel};
    const char* reason = nullptr;
    Engine* engine = octavo_open(&model, &settings, "", &reason);
    Texts texts = {{1, 2, 3}, {4}, std::vector<int32_t>(40, 5)};
    const size_t prompts[] = {3, 1, 40};
    for (bool more = true; more;) {
        more = false;
        for (int first = 0; first < 3; first += together ? 3 : 1) {
            std::vector<Request> requests;
            int32_t out[3][8], counts[3][8], ids[3][24];
            double logprobs[3][24];
            const int32_t draft[] = {6, 7};
            for (int i = first; i < (together ? 3 : first + 1); i++) {
                auto left = static_cast<int32_t>(prompts[i] + 40 - texts[i].size());
                if (left <= 0) continue;
                Sampling how{0.9, 0.95, 0.01, 1, 1.1, 0, 0.2, 25, 5};
                auto size = static_cast<int32_t>(texts[i].size());
                requests.push_back({i, size, drafts ? 2 : 0, static_cast<int32_t>(prompts[i]), 0, 2, left, -1,
                                    texts[i].data(), draft, how, 0, out[i], counts[i], ids[i], logprobs[i]});
            }
            if (requests.empty()) continue;
            more = true;
            int32_t result = UNFINISHED;
            while (result == UNFINISHED) result = octavo_step(engine, requests.data(), requests.size(), 8, 0.001);
            if (result != DONE) std::exit(2);
            for (const Request& r : requests) texts[r.index].insert(texts[r.index].end(), r.out, r.out + r.made);
        }
    }
    octavo_close(engine);
    return texts;
}

}  // namespace

int main() {
    for (int32_t storage : {F32, F16, I8, I4}) {
        Weights w;
        const int64_t D = 34, F = 54, heads = 30, kv = 10;  // 3 heads of 10, 1 for keys and values
        auto norm = [&] { return NormWeights{w.floats(D), w.floats(D)}; };
        auto head_norm = [&] { return NormWeights{w.floats(10), nullptr}; };
        std::vector<Block> blocks;
        for (int layer = 0; layer < 2; layer++)
            blocks.push_back({norm(), norm(), norm(), norm(), head_norm(), head_norm(), w.linear(storage, heads, D),
                              w.linear(storage, kv, D), w.linear(F32, kv, D), w.linear(storage, D, heads),
                              w.linear(storage, F, D), w.linear(storage, F, D), w.linear(storage, D, F)});
        const int32_t group = storage == I4 ? 17 : 0;
        Model model{2, 3, 1, 10, D, F, 31, 24, RMSNORM, SANDWICH, SILU, 1, 1e-5f, w.floats(24 * 5), w.floats(24 * 5),
                    w.matrix(storage, group, 31, D), w.matrix(F32, 0, 24, D), w.matrix(storage, group, 31, D),
                    norm(), blocks.data()};
        Texts expected = write(model, storage == F32 ? F32 : F16, 1, 64, false, false);
        for (int threads : {1, 3})
            for (int chunk : {4, 64})
                for (bool drafts : {false, true})
                    if (write(model, storage == F32 ? F32 : F16, threads, chunk, true, drafts) != expected) {
                        std::printf("storage %d, %d threads, chunks of %d: other ids\n", storage, threads, chunk);
                        return 1;
                    }
        for (int32_t id : expected[2]) std::printf("%d ", id);
        std::printf("\n");
    }
}
