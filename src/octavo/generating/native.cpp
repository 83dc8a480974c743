// The native engine: a GPT that writes on a CPU, from ids to ids without Python in between.
//
// native.py maps the weights, which stay where they are, and calls the C functions at the end of
// this file. kernels.h has the arithmetic and the threads, sampling.h the draws; here are the model,
// the caches of keys and values, and the loop.
//
// T tokens of any slots go through the model in one pass. What a token gets does not depend on its
// neighbours, bit for bit: products and attention take their sums in an order of the row's own, and
// everything else is done token by token.
#include "kernels.h"
#include "sampling.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace octavo {

// ---- what native.py hands over: the same structures stand there -----------------------------------

struct Linear {
    Matrix weight;
    const float* bias;  // or null
};

struct NormWeights {
    const float *weight, *bias;  // null where there is none
};

struct Block {
    NormWeights attn_norm, mlp_norm, attn_out_norm, mlp_out_norm, q_norm, k_norm;
    Linear q_proj, k_proj, v_proj, o_proj, up_proj, gate_proj, down_proj;
};

enum NormPosition : int32_t { PRE = 0, POST = 1, SANDWICH = 2 };

struct Model {
    int32_t n_layer, n_head, n_kv_head, head_dim, d_model, d_ff, vocab_size, block_size;
    int32_t norm, norm_position, activation, gated;
    float norm_eps;
    const float *cos, *sin;  // (block_size, head_dim / 2); null without RoPE
    Matrix tok_emb, pos_emb, lm_head;  // pos_emb.data is null without learned positions
    NormWeights norm_f;
    const Block* blocks;
};

struct Settings {
    int32_t slots, vocab, threads, cache_storage, chunk;
    int64_t cache_budget;  // bytes
    const std::atomic<int32_t>* cancel;
};

// One slot in a step. `made` counts what `out` holds; a step that is called again goes on from there.
struct Request {
    int32_t index, count, draft_count, prompt_length, n, logprobs, left, eot;
    const int32_t *ids, *draft;
    Sampling sampling;
    int32_t made;
    int32_t *out, *top_counts, *top_ids;  // top_counts[i] pairs for out[i], logprobs + 1 places each
    double* top_logprobs;
    float* logits;  // what each of out was drawn from, vocab numbers each; or null
};

enum Result : int32_t { DONE = 0, UNFINISHED = 1, CANCELLED = 2, BAD_ID = 3, NOT_FINITE = 4, NO_MEMORY = 5 };

struct Failure {
    Result result;
    int64_t detail;
};

// ---- caches ---------------------------------------------------------------------------------------

int64_t window_start(int64_t length, int64_t block_size) {  // as in writing.py
    int64_t half = std::max<int64_t>(1, block_size / 2);
    return length > block_size ? (length - block_size + half - 1) / half * half : 0;
}

// Memory for numbers, at whole cache lines; what it held is lost when it grows.
template <class Number>
class Buffer {
public:
    void fit(int64_t size) {
        if (size <= size_) return;
        memory_.reset(static_cast<Number*>(std::aligned_alloc(64, round_up(size * sizeof(Number), 64))));
        size_ = memory_ ? size : 0;
        if (!memory_) throw std::bad_alloc();
    }
    Number* data() { return memory_.get(); }
    Number& operator[](int64_t i) { return memory_.get()[i]; }

private:
    std::unique_ptr<Number, decltype(&std::free)> memory_{nullptr, &std::free};
    int64_t size_ = 0;
};

// The ids a slot has read and the keys and values of each, at the positions 0, 1, 2 ...
struct Slot {
    std::vector<int32_t> ids;
    std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
    int64_t capacity = 0;
};

// One slot's part of a pass: the tokens [first, first + count) stand at `position` and after. The
// last `wanted` of them get logits, in the rows from `row` on.
struct Run {
    Slot* slot;
    Request* request;
    int64_t position;
    int first, count, wanted, row;
};

using Range = std::pair<int64_t, int64_t>;

Range split(int64_t size, int part, int parts) { return {size * part / parts, size * (part + 1) / parts}; }

class Engine {
public:
    Engine(const Model& model, const Settings& settings, const Kernels& kernels)
        : m_(model), s_(settings), k_(kernels), blocks_(model.blocks, model.blocks + model.n_layer),
          pool_(settings.threads), slots_(settings.slots), streams_(pool_.threads()), samplers_(pool_.threads()) {
        for (const Block& b : blocks_) {
            measure({&b.q_proj, &b.k_proj, &b.v_proj});
            measure({&b.up_proj, &b.gate_proj});
            measure({&b.o_proj});
            measure({&b.down_proj});
        }
        rounded_[0] = std::max(rounded_[0], rounded_bytes(m_.lm_head));
    }

    int64_t detail = 0;  // of the last failure

    void release(int index) { slots_[index].ids.clear(); }

    // Let the slot `to` hold the first `count` ids that `from` holds, fewer if it holds no more; they
    // may be one.
    void pass_on(int from, int to, int64_t count) {
        Slot &source = slots_[from], &target = slots_[to];
        count = std::min<int64_t>(count, source.ids.size());
        if (from != to) {
            reserve(target, count);
            int64_t theirs = head_bytes(source.capacity), ours = head_bytes(target.capacity);
            for (int64_t part = 0; part < int64_t{2} * m_.n_layer * m_.n_kv_head; part++)
                std::memcpy(target.memory.get() + part * ours, source.memory.get() + part * theirs,
                            head_bytes(round_up(count, PANEL)));
            target.ids = source.ids;
        }
        target.ids.resize(count);
    }

    // Draw the next ids of each request, at most `most` of each; see Engine.step in writing.py.
    Result step(Request* requests, int count, int most, double seconds) {
        m_.lm_head.rows = s_.vocab;  // padded ids are never drawn: their logits are not needed
        auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
        std::vector<std::vector<int32_t>> texts(count);
        bool drafts = false;
        for (int i = 0; i < count; i++) {
            Request& r = requests[i];
            check_ids(r.ids, r.count);
            check_ids(r.draft, r.draft_count);
            texts[i].reserve(r.count + most);
            texts[i].assign(r.ids, r.ids + r.count);
            texts[i].insert(texts[i].end(), r.out, r.out + r.made);
            drafts |= r.draft_count > 0;
        }
        for (bool begun = false;; begun = true) {
            int least = most;
            bool ended = false;
            for (const Request* r = requests; r < requests + count; r++) {
                least = std::min(least, r->made);
                ended |= r->made && (r->made >= r->left || r->out[r->made - 1] == r->eot);
            }
            bool late = begun && std::chrono::steady_clock::now() >= deadline;
            if (least >= most || (least && (late || drafts || ended))) return DONE;
            if (late) return UNFINISHED;
            gather(requests, texts, least, most);
            if (!forward()) return CANCELLED;
            draw(texts, requests);
        }
    }

    // The logits (count, vocab_size) after each of the ids.
    void logits(const int32_t* ids, int count, float* out) {
        check_ids(ids, count);
        release(0);
        m_.lm_head.rows = m_.vocab_size;
        for (int done = 0; done < count;) {
            int size = std::min(count - done, s_.chunk);
            start_pass();
            add_run(slots_[0], nullptr, ids + done, size, size);
            if (!forward()) throw Failure{CANCELLED, 0};
            std::copy_n(logits_.data(), int64_t{size} * m_.vocab_size, out + int64_t{done} * m_.vocab_size);
            done += size;
        }
        release(0);
    }

private:
    // What a thread works on between two products. A pass of few tokens gives every thread its own
    // copy: doing it all again is cheaper than waiting for the others. Else all share the first.
    struct Stream {
        Buffer<float> x, h, states;        // residual stream, its norm, both (T, D); final (wanted, D)
        Buffer<unsigned char> rounded[3];  // the input of up to three matrices, as they want it
        Buffer<float> scratch;             // for attend: each thread's own in any case
    };

    Model m_;
    const Settings s_;
    const Kernels& k_;
    const std::vector<Block> blocks_;
    Pool pool_;
    std::vector<Slot> slots_;
    std::vector<Stream> streams_;
    std::vector<Sampler> samplers_;
    int64_t cache_bytes_ = 0;
    int64_t rounded_[3] = {};  // bytes a token in Stream::rounded
    std::atomic<bool> cancelled_{false};

    // One pass.
    std::vector<Run> runs_;
    std::vector<int32_t> ids_;        // (T,)
    std::vector<int64_t> positions_;  // (T,)
    std::vector<int> rows_;           // (T,): which row of logits, or -1
    int wanted_ = 0;
    bool alone_ = false;
    Buffer<float> queries_, keys_, values_, attended_, y_, up_, gate_, logits_;  // (T, ...)

    static constexpr int FEW = 2;  // tokens that every thread carries by itself

    // Room for what these matrices, which read one input, want of it.
    void measure(std::initializer_list<const Linear*> readers) {
        int i = 0;
        for (const Linear* reader : readers) {
            if (reader->weight.data && (!i || !same_rounding(reader->weight, (*readers.begin())->weight)))
                rounded_[i] = std::max(rounded_[i], rounded_bytes(reader->weight));
            i++;
        }
    }

    // ---- planning a pass

    void check_ids(const int32_t* ids, int count) const {
        for (int i = 0; i < count; i++)
            if (ids[i] < 0 || ids[i] >= m_.vocab_size) throw Failure{BAD_ID, ids[i]};
    }

    void start_pass() {
        runs_.clear();
        ids_.clear();
        positions_.clear();
        rows_.clear();
        wanted_ = 0;
    }

    // Fill a pass with what the requests that made the least lack: unread ids, then the draft. The
    // last id and the draft, whose logits are wanted, go in one pass.
    void gather(Request* requests, const std::vector<std::vector<int32_t>>& texts, int least, int most) {
        start_pass();
        int room = s_.chunk;
        for (size_t i = 0; i < texts.size() && room; i++) {
            Request& r = requests[i];
            if (r.made > least) continue;
            const std::vector<int32_t>& text = texts[i];
            int64_t start = window_start(text.size(), m_.block_size), length = text.size() - start;
            const int32_t* window = text.data() + start;
            Slot& slot = slots_[r.index];
            auto last = window + length - 1;
            auto same = std::mismatch(window, last, slot.ids.begin(), slot.ids.end()).first - window;
            slot.ids.resize(same);
            int draft = std::max<int64_t>(0, std::min<int64_t>({r.draft_count, most - 1, r.left - 1,
                                                                m_.block_size - length, s_.chunk - 1}));
            std::vector<int32_t> unread(window + same, last + 1);
            unread.insert(unread.end(), r.draft, r.draft + draft);
            int size = static_cast<int>(unread.size()), take = std::min(size, room);
            if (take < size) take = std::min(take, size - draft - 1);
            if (!take) continue;
            reserve(slot, same + size);
            add_run(slot, &r, unread.data(), take, take == size ? draft + 1 : 0);
            room -= take;
        }
    }

    void add_run(Slot& slot, Request* request, const int32_t* ids, int count, int wanted) {
        int64_t position = slot.ids.size();
        reserve(slot, position + count);
        runs_.push_back({&slot, request, position, static_cast<int>(ids_.size()), count, wanted, wanted_});
        for (int i = 0; i < count; i++) {
            ids_.push_back(ids[i]);
            positions_.push_back(position + i);
            rows_.push_back(i < count - wanted ? -1 : wanted_++);
        }
    }

    int64_t head_bytes(int64_t capacity) const { return capacity * m_.head_dim * (s_.cache_storage == F32 ? 4 : 2); }

    // Make room for so many tokens, at least doubling the room there is.
    void reserve(Slot& slot, int64_t tokens) {
        if (tokens <= slot.capacity) return;
        int64_t capacity = round_up(std::min<int64_t>(std::max(tokens, 2 * slot.capacity), m_.block_size), PANEL);
        int64_t parts = int64_t{2} * m_.n_layer * m_.n_kv_head;
        int64_t old = head_bytes(slot.capacity), size = head_bytes(capacity), more = parts * (size - old);
        if (cache_bytes_ + more > s_.cache_budget) throw Failure{NO_MEMORY, cache_bytes_ + more};
        char* memory = static_cast<char*>(std::calloc(parts, size));
        if (!memory) throw Failure{NO_MEMORY, cache_bytes_ + more};
        for (int64_t part = 0; part < parts && old; part++)
            std::memcpy(memory + part * size, slot.memory.get() + part * old, old);
        slot.memory.reset(memory);
        slot.capacity = capacity;
        cache_bytes_ += more;
    }

    Cache cache(const Slot& slot, int layer, int64_t head) const {
        int64_t size = head_bytes(slot.capacity);
        char* keys = slot.memory.get() + 2 * (layer * m_.n_kv_head + head) * size;
        return {s_.cache_storage, m_.head_dim, slot.capacity, keys, keys + size};
    }

    // ---- one pass through the model, by all threads

    // Reads the pass's tokens; false when cancelled, and then nothing was read.
    bool forward() {
        int64_t T = ids_.size(), heads = int64_t{m_.n_head} * m_.head_dim, kv = int64_t{m_.n_kv_head} * m_.head_dim;
        alone_ = T <= FEW || pool_.threads() == 1;
        queries_.fit(T * heads);
        attended_.fit(T * heads);
        keys_.fit(T * kv);
        values_.fit(T * kv);
        y_.fit(T * m_.d_model);
        up_.fit(T * m_.d_ff);
        if (m_.gated) gate_.fit(T * m_.d_ff);
        logits_.fit(int64_t{wanted_} * m_.lm_head.rows);
        int64_t longest = 0;
        for (const Run& run : runs_) longest = std::max(longest, run.position + run.count);
        for (Stream& stream : streams_) {
            stream.scratch.fit(attend_room(longest));
            if (&stream != &streams_[0] && !alone_) continue;
            stream.x.fit(T * m_.d_model);
            stream.h.fit(T * m_.d_model);
            stream.states.fit(int64_t{wanted_} * m_.d_model);
            for (int i = 0; i < 3; i++) stream.rounded[i].fit(T * rounded_[i]);
        }
        cancelled_ = false;
        pool_.run([](void* self, int thread) { static_cast<Engine*>(self)->work(thread); }, this);
        if (cancelled_) return false;
        for (const Run& run : runs_)
            run.slot->ids.insert(run.slot->ids.end(), &ids_[run.first], &ids_[run.first] + run.count);
        return true;
    }

    Stream& stream(int thread) { return streams_[alone_ ? thread : 0]; }

    // Do something to every token: each thread to all of its own copy, or to its share of them.
    template <class Work>
    void each_token(int thread, Work what) {
        int T = static_cast<int>(ids_.size());
        auto [first, last] = alone_ ? Range{0, T} : split(T, thread, pool_.threads());
        for (int64_t t = first; t < last; t++) what(t);
        if (!alone_) pool_.barrier();
    }

    void work(int thread) {
        Stream& s = stream(thread);
        const int64_t D = m_.d_model;
        each_token(thread, [&](int64_t t) {
            float* x = &s.x[t * D];
            k_.row(m_.tok_emb, ids_[t], x);
            if (m_.pos_emb.data) {
                k_.row(m_.pos_emb, positions_[t], &s.h[t * D]);
                for (int64_t i = 0; i < D; i++) x[i] += s.h[t * D + i];
            }
            enter(s, t, blocks_[0].attn_norm, {&blocks_[0].q_proj, &blocks_[0].k_proj, &blocks_[0].v_proj});
        });
        for (int layer = 0; layer < m_.n_layer; layer++) {
            const Block& b = blocks_[layer];
            project(s, thread, {&b.q_proj, &b.k_proj, &b.v_proj}, {queries_.data(), keys_.data(), values_.data()});
            pool_.barrier();
            attend(thread, layer);
            if (only_read(layer)) return;
            pool_.barrier();
            sublayer(s, thread, b.o_proj, attended_.data());
            each_token(thread, [&](int64_t t) {
                leave(s, t, b.attn_norm, b.attn_out_norm);
                if (m_.gated) enter(s, t, b.mlp_norm, {&b.up_proj, &b.gate_proj});
                else enter(s, t, b.mlp_norm, {&b.up_proj});
            });
            hidden(s, thread, b);
            pool_.barrier();
            if (thread == 0 && s_.cancel && *s_.cancel) cancelled_ = true;  // all see it after the barrier
            sublayer(s, thread, b.down_proj, m_.gated ? gate_.data() : up_.data());
            if (cancelled_) return;
            each_token(thread, [&](int64_t t) {
                leave(s, t, b.mlp_norm, b.mlp_out_norm);
                if (layer + 1 < m_.n_layer) {
                    const Block& next = blocks_[layer + 1];
                    enter(s, t, next.attn_norm, {&next.q_proj, &next.k_proj, &next.v_proj});
                } else if (rows_[t] >= 0) {
                    finish(s, t, rows_[t]);
                }
            });
        }
        Activations states = input(s, 0, m_.lm_head, s.states.data(), wanted_);
        auto [first, last] = my_rows(m_.lm_head.rows, thread);
        if (first < last) k_.product(m_.lm_head, states, first, last, logits_.data(), m_.lm_head.rows);
    }

    // The middle of a prompt leaves nothing but keys and values behind: after the last layer's it is done.
    bool only_read(int layer) const { return !wanted_ && layer + 1 == m_.n_layer; }

    // The sublayer's input: the residual stream, normed unless norms come after; rounded for the
    // matrices that read it.
    void enter(Stream& s, int64_t t, const NormWeights& norm, std::initializer_list<const Linear*> readers) {
        const float* x = &s.x[t * m_.d_model];
        float* h = &s.h[t * m_.d_model];
        if (m_.norm_position == POST) std::copy_n(x, m_.d_model, h);
        else k_.norm(m_.norm, x, norm.weight, norm.bias, m_.norm_eps, m_.d_model, h);
        int i = 0;
        for (const Linear* reader : readers) round(s, i++, reader->weight, s.h.data(), t, *readers.begin());
    }

    // Add the sublayer's output y: pre x + y; post norm(x + y); sandwich x + norm(y).
    void leave(Stream& s, int64_t t, const NormWeights& norm, const NormWeights& out_norm) {
        const int64_t D = m_.d_model;
        float *x = &s.x[t * D], *h = &s.h[t * D];
        const float* y = &y_[t * D];
        if (m_.norm_position == SANDWICH) {
            k_.norm(m_.norm, y, out_norm.weight, out_norm.bias, m_.norm_eps, D, h);
            y = h;
        }
        for (int64_t i = 0; i < D; i++) x[i] += y[i];
        if (m_.norm_position == POST) k_.norm(m_.norm, x, norm.weight, norm.bias, m_.norm_eps, D, x);
    }

    // The final state of token t, for the head's row.
    void finish(Stream& s, int64_t t, int row) {
        const float* x = &s.x[t * m_.d_model];
        float* state = &s.states[int64_t{row} * m_.d_model];
        if (m_.norm_position == POST) std::copy_n(x, m_.d_model, state);  // normed by the last block
        else k_.norm(m_.norm, x, m_.norm_f.weight, m_.norm_f.bias, m_.norm_eps, m_.d_model, state);
        round(s, 0, m_.lm_head, s.states.data(), row, nullptr);
    }

    // Round token t of `values` (T, cols) for a matrix, the i-th of those that read it, unless that
    // has been done for the first.
    void round(Stream& s, int i, const Matrix& m, const float* values, int64_t t, const Linear* first) {
        if (i && same_rounding(m, first->weight)) return;
        k_.prepare(m, input(s, i, m, values, t + 1), t, t + 1);
    }

    static bool same_rounding(const Matrix& a, const Matrix& b) { return a.storage == b.storage && a.group == b.group; }

    Activations input(Stream& s, int i, const Matrix& m, const float* values, int64_t count) {
        return {count, m.cols, m.cols, values, s.rounded[i].data()};
    }

    Range my_rows(int64_t rows, int thread) const {
        Range mine;
        share(rows, thread, pool_.threads(), &mine.first, &mine.second);
        return mine;
    }

    // Rows [first, last) of y = W x + b for every token.
    void multiply(const Linear& l, const Activations& a, Range rows, float* y) {
        auto [first, last] = rows;
        if (first >= last) return;
        k_.product(l.weight, a, first, last, y, l.weight.rows);
        if (l.bias)
            for (int64_t t = 0; t < a.count; t++)
                for (int64_t r = first; r < last; r++) y[t * l.weight.rows + r] += l.bias[r];
    }

    // Several matrices on one input, their panels shared out as if they were one.
    void project(Stream& s, int thread, std::initializer_list<const Linear*> linears, std::initializer_list<float*> outs) {
        int64_t total = 0, before = 0;
        for (const Linear* l : linears) total += round_up(l->weight.rows, PANEL);
        auto [first, last] = my_rows(total, thread);
        int i = 0;
        for (const Linear* l : linears) {
            const Matrix& m = l->weight;
            Range rows = {std::clamp<int64_t>(first - before, 0, m.rows), std::clamp<int64_t>(last - before, 0, m.rows)};
            int rounded = same_rounding(m, (*linears.begin())->weight) ? 0 : i;
            multiply(*l, input(s, rounded, m, s.h.data(), ids_.size()), rows, outs.begin()[i++]);
            before += round_up(m.rows, PANEL);
        }
    }

    // The sublayer's last matrix, which reads `values` (T, cols), into y.
    void sublayer(Stream& s, int thread, const Linear& l, const float* values) {
        if (rounded_bytes(l.weight))
            each_token(thread, [&](int64_t t) { round(s, 0, l.weight, values, t, nullptr); });
        multiply(l, input(s, 0, l.weight, values, ids_.size()), my_rows(l.weight.rows, thread), y_.data());
        pool_.barrier();
    }

    // The MLP up to its activation; a thread activates the rows it has multiplied.
    void hidden(Stream& s, int thread, const Block& b) {
        Range rows = my_rows(m_.d_ff, thread);
        int64_t T = ids_.size(), size = rows.second - rows.first;
        multiply(b.up_proj, input(s, 0, b.up_proj.weight, s.h.data(), T), rows, up_.data());
        if (m_.gated) {
            int rounded = same_rounding(b.gate_proj.weight, b.up_proj.weight) ? 0 : 1;
            multiply(b.gate_proj, input(s, rounded, b.gate_proj.weight, s.h.data(), T), rows, gate_.data());
        }
        for (int64_t t = 0; t < T && size; t++) {
            int64_t at = t * m_.d_ff + rows.first;
            if (m_.gated) k_.activate(m_.activation, &gate_[at], &up_[at], size);
            else k_.activate(m_.activation, &up_[at], nullptr, size);
        }
    }

    // ---- attention

    // A unit is one key/value head of one run. A thread stores its units' keys and values, then lets
    // their queries look. With fewer units than threads the queries are shared out one by one.
    void attend(int thread, int layer) {
        int threads = pool_.threads();
        int64_t group = m_.n_head / m_.n_kv_head, units = int64_t(runs_.size()) * m_.n_kv_head;
        Range mine = split(units, thread, threads);
        for (int64_t u = mine.first; u < mine.second; u++)
            remember(layer, runs_[u / m_.n_kv_head], u % m_.n_kv_head);
        if (only_read(layer)) return;
        Range queries = {mine.first * group, mine.second * group};
        if (units < threads) {
            pool_.barrier();
            queries = split(units * group, thread, threads);
        }
        for (int64_t i = queries.first; i < queries.second; i++)
            look(thread, layer, runs_[i / m_.n_head], i % m_.n_head);
    }

    void remember(int layer, const Run& run, int64_t head) {
        Cache kept = cache(*run.slot, layer, head);
        int64_t stride = int64_t{m_.n_kv_head} * m_.head_dim;
        for (int64_t t = run.first; t < run.first + run.count; t++) {
            float* key = &keys_[t * stride + head * m_.head_dim];
            place(key, positions_[t], blocks_[layer].k_norm);
            k_.remember(kept, positions_[t], key, &values_[t * stride + head * m_.head_dim]);
        }
    }

    void look(int thread, int layer, const Run& run, int64_t head) {
        int64_t stride = int64_t{m_.n_head} * m_.head_dim, at = run.first * stride + head * m_.head_dim;
        for (int64_t t = 0; t < run.count; t++)
            place(&queries_[at + t * stride], run.position + t, blocks_[layer].q_norm);
        Cache kept = cache(*run.slot, layer, head * m_.n_kv_head / m_.n_head);
        float scale = 1 / std::sqrt(static_cast<float>(m_.head_dim));
        k_.attend(kept, run.position + 1, run.count, &queries_[at], stride, scale, &attended_[at], stride,
                  streams_[thread].scratch.data());
    }

    // A head's query or key: its own norm, then rotated by its position.
    void place(float* x, int64_t position, const NormWeights& norm) {
        if (norm.weight) k_.norm(RMSNORM, x, norm.weight, nullptr, m_.norm_eps, m_.head_dim, x);
        if (!m_.cos) return;
        const int64_t half = m_.head_dim / 2;
        const float *cos = m_.cos + position * half, *sin = m_.sin + position * half;
        for (int64_t i = 0; i < half; i++) {
            float first = x[i], second = x[i + half];
            x[i] = first * cos[i] - second * sin[i];
            x[i + half] = second * cos[i] + first * sin[i];
        }
    }

    // ---- from logits to ids

    void draw(std::vector<std::vector<int32_t>>& texts, Request* requests) {
        std::vector<const Run*> ready;
        for (const Run& run : runs_)
            if (run.wanted) ready.push_back(&run);
        std::atomic<bool> finite{true};
        auto work = [&](int thread) {
            auto [first, last] = split(ready.size(), thread, ready.size() > 1 ? pool_.threads() : 1);
            for (int64_t i = first; i < last; i++) {
                const Run& run = *ready[i];
                try {
                    draw(run, texts[run.request - requests], samplers_[thread]);
                } catch (NonFinite) {
                    finite = false;
                }
            }
        };
        if (ready.size() == 1) work(0);
        else if (!ready.empty())
            pool_.run([](void* what, int thread) { (*static_cast<decltype(work)*>(what))(thread); }, &work);
        if (!finite) throw Failure{NOT_FINITE, 0};
    }

    // Draw at each wanted position while the draft agrees. The slot has read the draft's rest in vain:
    // the next pass compares.
    void draw(const Run& run, std::vector<int32_t>& text, Sampler& sampler) {
        Request& r = *run.request;
        const int draft = run.wanted - 1;
        for (int i = 0; i <= draft; i++) {
            const float* logits = &logits_[int64_t{run.row + i} * s_.vocab];
            int32_t token = sampler.pick(logits, s_.vocab, text, r.sampling, r.n, r.prompt_length);
            int64_t at = int64_t{r.made} * (r.logprobs + 1);
            if (r.logits) std::copy_n(logits, s_.vocab, r.logits + int64_t{r.made} * s_.vocab);
            r.top_counts[r.made] = r.logprobs ? sampler.top_logprobs(logits, s_.vocab, r.logprobs, token,
                                                                     r.top_ids + at, r.top_logprobs + at) : 0;
            r.out[r.made++] = token;
            text.push_back(token);
            if (i == draft || token != r.draft[i] || token == r.eot) return;
        }
    }
};

// Run `what`, and turn what it throws into a result.
template <class What>
Result guarded(Engine* engine, What what) {
    try {
        return what();
    } catch (const Failure& failure) {
        engine->detail = failure.detail;
        return failure.result;
    } catch (const std::bad_alloc&) {
        engine->detail = 0;
        return NO_MEMORY;
    }
}

}  // namespace octavo

// ---- the C interface ------------------------------------------------------------------------------

#define OCTAVO_EXPORT extern "C" __attribute__((visibility("default")))

// An engine, or null and why in `reason`. `isa` forces an instruction set, where it is not empty.
OCTAVO_EXPORT octavo::Engine* octavo_open(const octavo::Model* model, const octavo::Settings* settings,
                                          const char* isa, const char** reason) {
    const octavo::Kernels* kernels = octavo::pick(isa, reason);
    if (!kernels) return nullptr;
    try {
        return new octavo::Engine(*model, *settings, *kernels);
    } catch (const std::bad_alloc&) {
        *reason = "there is no memory for it";
        return nullptr;
    }
}

OCTAVO_EXPORT void octavo_close(octavo::Engine* engine) { delete engine; }

OCTAVO_EXPORT int32_t octavo_step(octavo::Engine* engine, octavo::Request* requests, int32_t count, int32_t most,
                                  double seconds) {
    return octavo::guarded(engine, [&] { return engine->step(requests, count, most, seconds); });
}

OCTAVO_EXPORT int32_t octavo_logits(octavo::Engine* engine, const int32_t* ids, int32_t count, float* out) {
    return octavo::guarded(engine, [&] {
        engine->logits(ids, count, out);
        return octavo::DONE;
    });
}

OCTAVO_EXPORT void octavo_release(octavo::Engine* engine, int32_t index) { engine->release(index); }

OCTAVO_EXPORT int32_t octavo_share(octavo::Engine* engine, int32_t from, int32_t to, int32_t count) {
    return octavo::guarded(engine, [&] {
        engine->pass_on(from, to, count);
        return octavo::DONE;
    });
}

OCTAVO_EXPORT int64_t octavo_detail(const octavo::Engine* engine) { return engine->detail; }

// The sampler by itself, to be held against sampling.py: the id, or -1 for logits that are not finite.
OCTAVO_EXPORT int32_t octavo_pick(const float* logits, int64_t vocab, const int32_t* ids, int64_t count,
                                  const octavo::Sampling* sampling, int64_t n, int64_t prompt_length) {
    octavo::Sampler sampler;
    try {
        return sampler.pick(logits, vocab, std::vector<int32_t>(ids, ids + count), *sampling, n, prompt_length);
    } catch (octavo::NonFinite) {
        return -1;
    }
}
