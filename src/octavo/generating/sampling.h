// From a model's logits to the next token: sampling.py once more, definition for definition.
//
// Every number is a double and every sum is taken one term after the other in the order stated
// there, so a draw is the Python code's own but for the last bit of exp and log. What a filter cuts
// away leaves the list instead of becoming -inf: to a sum it would add exact zeros.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

// The same loop compiled for wider vectors, picked when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__) && \
        !defined(__SANITIZE_ADDRESS__)
#define OCTAVO_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define OCTAVO_WIDE
#endif

namespace octavo {

struct Sampling {  // as ctypes passes it
    double temperature, top_p, min_p, typical_p;
    double repetition_penalty, presence_penalty, frequency_penalty;
    int64_t top_k;
    uint64_t seed;
};

struct NonFinite {};  // thrown for NaN, infinity, or when every id is ruled out

constexpr double greedy_below = 1e-5;

inline uint64_t splitmix64(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

inline double uniform(uint64_t seed, uint64_t n, uint64_t position) {
    return static_cast<double>(splitmix64(splitmix64(seed, n), position) >> 11) * 0x1p-53;
}

inline double power_of_two(double k) {  // 2^k for a whole k from -1022 to 1023
    double shifted = k + 0x1.8p52;  // k now is the lowest bits
    uint64_t bits;
    std::memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, 8);
    return power;
}

// exp(x) for x <= 0, within one unit in the last place: x = k ln 2 + r, and Taylor's series of r.
inline double exp_negative(double x) {
    x = x > -746.0 ? x : -746.0;  // smaller ones are zero, -inf too
    double k = (x * 0x1.71547652b82fep0 + 0x1.8p52) - 0x1.8p52;
    double r = (x - k * 0x1.62e42fefa3800p-1) - k * 0x1.ef35793c76730p-45;
    constexpr double factorials[] = {2,     6,      24,      120,      720,       5040,
                                     40320, 362880, 3628800, 39916800, 479001600, 6227020800};
    double p = 1 / factorials[11];
    for (int i = 10; i >= 0; i--) p = p * r + 1 / factorials[i];
    double high = k > -1000.0 ? k : -1000.0;  // the last factor may leave the normal numbers
    return (1 + (r + r * r * p)) * power_of_two(high) * power_of_two(k - high);
}

OCTAVO_WIDE inline void exp_all(const double* x, double largest, double* weights, size_t size) {
    for (size_t i = 0; i < size; i++) weights[i] = exp_negative(x[i] - largest);
}

// The largest of them; NaN where one is.
template <class Number>
inline Number largest_of(const Number* x, size_t size) {
    constexpr size_t width = 16;
    Number best[width], sum = 0;
    std::fill_n(best, width, -std::numeric_limits<Number>::infinity());
    size_t i = 0;
    bool odd[width] = {};
    for (; i + width <= size; i += width)
        for (size_t j = 0; j < width; j++) {
            best[j] = x[i + j] > best[j] ? x[i + j] : best[j];
            odd[j] |= x[i + j] != x[i + j];
        }
    for (; i < size; i++) {
        best[0] = x[i] > best[0] ? x[i] : best[0];
        odd[0] |= x[i] != x[i];
    }
    for (bool each : odd) sum += each;
    return sum > 0 ? std::numeric_limits<Number>::quiet_NaN() : *std::max_element(best, best + width);
}

class Sampler {
public:
    // The token after `history`, of which the first `prompt_length` ids were given.
    int32_t pick(const float* logits, size_t vocab, const std::vector<int32_t>& history,
                 const Sampling& s, uint64_t n, size_t prompt_length) {
        float largest = largest_of(logits, vocab);
        if (!std::isfinite(largest)) throw NonFinite();
        bool greedy = s.temperature < greedy_below, penal = s.presence_penalty || s.frequency_penalty;
        if (greedy && s.repetition_penalty == 1 && !penal)
            return static_cast<int32_t>(std::find(logits, logits + vocab, largest) - logits);
        ids_.resize(vocab);
        std::iota(ids_.begin(), ids_.end(), 0);
        x_.assign(logits, logits + vocab);
        if (s.repetition_penalty != 1)
            each_seen(history, 0, vocab, [&](double& x, int) {
                x = x < 0 ? x * s.repetition_penalty : x / s.repetition_penalty;
            });
        if (penal)
            each_seen(history, prompt_length, vocab, [&](double& x, int count) {
                x -= s.presence_penalty + s.frequency_penalty * count;
            });
        if (greedy)
            return static_cast<int32_t>(std::max_element(x_.begin(), x_.end()) - x_.begin());
        if (s.temperature != 1)
            for (double& x : x_) x /= s.temperature;
        if (s.top_k) top_k(s.top_k);
        if (s.top_p < 1) top_p(s.top_p, vocab);
        if (s.min_p > 0) min_p(s.min_p);
        if (s.typical_p < 1) typical_p(s.typical_p);
        double total = weigh(), target = uniform(s.seed, n, history.size()) * total, running = 0;
        size_t i = 0;
        while ((running += w_[i]) <= target) i++;
        return ids_[i];
    }

    // The k most probable ids, best first, and `chosen` where it is not among them; returns how many.
    int top_logprobs(const float* logits, size_t vocab, int k, int32_t chosen, int32_t* ids,
                     double* logprobs) {
        x_.assign(logits, logits + vocab);
        double largest = largest_of(x_.data(), vocab), log_total = std::log(weigh());
        order_.clear();
        double least = kth_largest(k);
        for (size_t i = 0; i < vocab; i++)
            if (x_[i] >= least && x_[i] > -std::numeric_limits<double>::infinity()) order_.push_back(i);
        std::stable_sort(order_.begin(), order_.end(), [&](auto a, auto b) { return x_[a] > x_[b]; });
        if (order_.size() > static_cast<size_t>(k)) order_.resize(k);
        uint32_t mine = static_cast<uint32_t>(chosen);
        if (std::find(order_.begin(), order_.end(), mine) == order_.end()) order_.push_back(mine);
        for (uint32_t i : order_) {
            *ids++ = static_cast<int32_t>(i);
            *logprobs++ = x_[i] - largest - log_total;
        }
        return static_cast<int>(order_.size());
    }

private:
    std::vector<int32_t> ids_;     // what is still in the race, in vocabulary order,
    std::vector<double> x_, w_;    // its logits, and its probabilities up to a common factor
    std::vector<uint32_t> order_;  // indices of these, sorted
    std::vector<double> bins_;     // probability of the histogram's bins
    std::vector<int> counts_;      // how often each id was seen; all zero between two calls

    // Probabilities up to a common factor, the largest exactly 1; returns their sum.
    double weigh() {
        w_.resize(x_.size());
        exp_all(x_.data(), largest_of(x_.data(), x_.size()), w_.data(), x_.size());
        double total = 0;
        for (double w : w_) total += w;
        return total;
    }

    template <class Test>
    void keep(Test test) {
        size_t kept = 0;
        for (size_t i = 0; i < x_.size(); i++)
            if (test(i)) {
                ids_[kept] = ids_[i];
                x_[kept++] = x_[i];
            }
        ids_.resize(kept);
        x_.resize(kept);
    }

    // Calls change(logit, how often) for each different id from `from` on; padded ids have no logit.
    template <class Change>
    void each_seen(const std::vector<int32_t>& history, size_t from, size_t vocab, Change change) {
        counts_.resize(vocab);
        for (size_t i = from; i < history.size(); i++)
            if (static_cast<size_t>(history[i]) < vocab) counts_[history[i]]++;
        for (size_t i = from; i < history.size(); i++)
            if (static_cast<size_t>(history[i]) < vocab && counts_[history[i]]) {
                change(x_[history[i]], counts_[history[i]]);
                counts_[history[i]] = 0;
            }
    }

    double kth_largest(int64_t k) const {
        std::vector<double> best;  // a heap of the k largest so far, the least of them on top
        for (double x : x_) {
            if (static_cast<int64_t>(best.size()) < k) {
                best.push_back(x);
                std::push_heap(best.begin(), best.end(), std::greater<>());
            } else if (x > best.front()) {
                std::pop_heap(best.begin(), best.end(), std::greater<>());
                best.back() = x;
                std::push_heap(best.begin(), best.end(), std::greater<>());
            }
        }
        return best.front();
    }

    void top_k(int64_t k) {
        double least = kth_largest(k);
        keep([&](size_t i) { return x_[i] >= least; });
    }

    void top_p(double p, size_t vocab) {
        double total = weigh(), target = p * total;
        double floor = (1 - p) * total / static_cast<double>(vocab);  // cf. sampling.py
        order_.clear();
        for (size_t i = 0; i < w_.size(); i++)
            if (w_[i] >= floor) order_.push_back(i);
        size_t last;
        if (order_.size() <= 1024 || !crossing_by_histogram(target, total, &last)) {
            sort_by_weight(order_);
            last = order_[first_to_hold(target)];
        }
        double least = w_[last];
        keep([&](size_t i) { return w_[i] > least || (w_[i] == least && i <= last); });
    }

    void sort_by_weight(std::vector<uint32_t>& order) const {
        std::sort(order.begin(), order.end(),
                            [&](uint32_t a, uint32_t b) { return w_[a] != w_[b] ? w_[a] > w_[b] : a < b; });
    }

    // The place in order_ at which the weights so far reach the target, or the last.
    size_t first_to_hold(double target) const {
        double held = 0;
        size_t i = 0;
        while (i + 1 < order_.size() && (held += w_[order_[i]]) < target) i++;
        return i;
    }

    static size_t bin_of(double weight) {  // 128 bins an octave, the largest weight's last
        uint64_t bits;
        std::memcpy(&bits, &weight, 8);
        return static_cast<size_t>(bits >> 45);
    }

    // Where a flat distribution crosses the target, without sorting it: whole bins of weights are
    // added from the top, and only the one that crosses is sorted. Sums in another order differ in
    // their last bits: where those could matter the answer is false, and the caller sorts all.
    bool crossing_by_histogram(double target, double total, size_t* last) {
        double least = w_[order_.front()];
        for (uint32_t i : order_) least = std::min(least, w_[i]);
        size_t lowest = bin_of(least), bin = bin_of(1.0) - lowest;
        bins_.assign(bin + 1, 0.0);
        for (uint32_t i : order_) bins_[bin_of(w_[i]) - lowest] += w_[i];
        double held = 0, doubt = 4e-16 * static_cast<double>(w_.size()) * total;
        while (bin > 0 && held + bins_[bin] < target) held += bins_[bin--];
        std::vector<uint32_t> inside;
        for (uint32_t i : order_)
            if (bin_of(w_[i]) - lowest == bin) inside.push_back(i);
        sort_by_weight(inside);
        for (uint32_t i : inside) {
            double before = held;
            held += w_[i];
            *last = i;
            if (held >= target) return before < target - doubt && held > target + doubt;
        }
        return false;
    }

    void min_p(double p) {
        double largest = largest_of(x_.data(), x_.size()), least = std::log(p);
        keep([&](size_t i) { return x_[i] - largest >= least; });
    }

    void typical_p(double p) {
        keep([&](size_t i) { return x_[i] > -std::numeric_limits<double>::infinity(); });
        double largest = largest_of(x_.data(), x_.size()), total = weigh(), entropy = 0;
        double log_total = std::log(total);
        std::vector<double> distance(x_.size());
        for (size_t i = 0; i < x_.size(); i++) {
            distance[i] = log_total - (x_[i] - largest);  // its surprise
            entropy += w_[i] / total * distance[i];
        }
        for (double& each : distance) each = std::abs(each - entropy);
        order_.resize(x_.size());
        std::iota(order_.begin(), order_.end(), 0u);
        std::stable_sort(order_.begin(), order_.end(),
                         [&](uint32_t a, uint32_t b) { return distance[a] < distance[b]; });
        double widest = distance[order_[first_to_hold(p * total)]];
        keep([&](size_t i) { return distance[i] <= widest; });
    }
};

}  // namespace octavo
