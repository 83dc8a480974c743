// What benchmarks/sampling.py times: drawing one token after another from the same logits.
#include "../src/octavo/generating/sampling.h"

using namespace octavo;

extern "C" void draw(const float* logits, int64_t vocab, const Sampling* settings, int64_t count,
                     int32_t* drawn) {
    static Sampler sampler;
    std::vector<int32_t> history = {1, 2, 3};
    for (int64_t i = 0; i < count; i++) {
        drawn[i] = sampler.pick(logits, static_cast<size_t>(vocab), history, *settings, 0, 3);
        history.push_back(drawn[i]);
    }
}
