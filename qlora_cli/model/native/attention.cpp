// Causal attention over rows laid end to end, each alone, in bfloat16 with sums in float32: forward and backward.
//
// Knows the bfloat16 units of x86 processors, AMX or AVX512-BF16, and does without others; nothing of Python.
// Invariant: one thread computes a row of one key head from end to end, so that sums are added in the same order
// however many threads there are.
//
// Scores are computed transposed, keys x queries, for blocks of 32 x 32: what is then needed as a factor of the next
// product, P^T and dS^T, lies in memory as that product reads it.

#ifndef __AVX512BF16__
extern "C" int attention_ready() { return 0; }
#else

#include "blocks.h"

#include <cmath>

static const float LOG2E = 1.44269504f, LN2 = 0.693147181f;
static const float LEAST = -150;  // 2 to this power is 0

struct Place {  // [T, heads, width]: where it is, and its strides in elements; the last is 1
    bf16 *data;
    int64_t by_token, by_head;
};

struct Call {
    Place q, k, v, out, dout, dq, dk, dv;
    float *logs;                                            // [heads, T] log of the sum of exponentials
    const int64_t *borders;                                 // [rows + 1]
    int64_t rows, tokens, heads, key_heads, width, window;  // window 0: none
    float scaling;
};

// 0: not on this processor; 1: by AVX512-BF16; 2: by AMX
extern "C" int attention_ready() { return amx ? 2 : 1; }

static inline __m512 exp2_of(__m512 x) {          // polynomial of least error on [-0.5, 0.5]: 2e-7 relative
    x = _mm512_max_ps(_mm512_set1_ps(LEAST), x);  // the second stays where it is not a number
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
           rest = _mm512_sub_ps(x, whole);
    static const float factors[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1};
    __m512 y = _mm512_set1_ps(factors[0]);
    for (int i = 1; i < 6; i++) y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(y, whole);
}

struct Head {  // a row of one head
    bf16 *data;
    int64_t stride, length, width, wide;  // wide: the width rounded up to whole blocks
    int64_t blocks() const { return (length + E - 1) / E; }

    void read(bf16 *into, int64_t block) const {  // [32, wide], zeros after the end
        for (int64_t i = 0; i < E; i++, into += wide) {
            int64_t token = block * E + i, given = token < length ? width : 0;
            memcpy(into, data + token * stride, given * 2);
            memset(into + given, 0, (wide - given) * 2);
        }
    }
    void write(const float *columns, __m512 low, __m512 high,
               int64_t block) const {  // [wide, 32], times a factor for each token
        for (int64_t at = 0; at < wide; at += 16)
            for (int half = 0; half < 2; half++) {
                __m512i r[16];
                for (int i = 0; i < 16; i++)
                    r[i] = _mm512_castps_si512(
                        _mm512_mul_ps(_mm512_loadu_ps(columns + (at + i) * E + 16 * half), half ? high : low));
                transpose(r);
                __mmask16 given = at + 16 <= width ? 0xffff : at >= width ? 0 : (1 << (width - at)) - 1;
                for (int64_t i = 0, token = block * E + 16 * half; i < 16 && token < length; i++, token++)
                    _mm256_mask_storeu_epi16(data + token * stride + at, given,
                                             (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(r[i])));
            }
    }
    void write_rows(const float *rows, float factor, int64_t block) const {  // [32, wide]
        for (int64_t i = 0, token = block * E; i < E && token < length; i++, token++)
            for (int64_t at = 0; at < width; at += 16) {
                __mmask16 given = at + 16 <= width ? 0xffff : (1 << (width - at)) - 1;
                __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(rows + i * wide + at), _mm512_set1_ps(factor));
                _mm256_mask_storeu_epi16(data + token * stride + at, given, (__m256i)_mm512_cvtneps_pbh(scaled));
            }
    }
};

static Head head_of(const Place &place, int64_t head, const Call &call, int64_t row) {
    int64_t first = call.borders[row];
    return {place.data + first * place.by_token + head * place.by_head, place.by_token, call.borders[row + 1] - first,
            call.width, (call.width + E - 1) / E * E};
}

struct Seen {  // which of 16 queries see a key
    int64_t key, window;
    __mmask16 of(int64_t query) const {
        __m512i ahead = _mm512_add_epi32(_mm512_set1_epi32((int)(query - key)),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        __mmask16 after = _mm512_cmpge_epi32_mask(ahead, _mm512_setzero_si512());
        return window ? after & _mm512_cmplt_epi32_mask(ahead, _mm512_set1_epi32((int)window)) : after;
    }
};

static bool on_edge(int64_t keys, int64_t queries, int64_t window) {  // blocks of which not every query sees every key
    return keys == queries || (window && (queries - keys + 1) * E > window);
}

static int64_t first_seen(int64_t queries, int64_t window) {
    int64_t key = window ? queries * E - window + 1 : 0;
    return key > 0 ? key / E : 0;
}

static void forward_head(const Call &call, int64_t row, int64_t head, const bf16 *keys, const bf16 *values,
                         float *scores) {
    Head q = head_of(call.q, head, call, row), out = head_of(call.out, head, call, row);
    int64_t wide = q.wide, block = E * wide, steps = wide / E;
    bf16 *rows = room.piece<bf16>(block), *columns = room.piece<bf16>(block), *p = room.piece<bf16>(E * E);
    float *sums = room.piece<float>(block), *lse = call.logs + head * call.tokens + call.borders[row];
    const __m512 factor = _mm512_set1_ps(call.scaling * LOG2E), never = _mm512_set1_ps(-INFINITY);
    for (int64_t queries = 0; queries < q.blocks(); queries++) {
        q.read(rows, queries);
        across(columns, rows, wide);
        __m512 most[2] = {never, never}, total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        int64_t first = first_seen(queries, call.window);
        for (int64_t at = first; at <= queries; at++) {
            float *s = scores + (at - first) * E * E;
            product(s, keys + at * block, wide, columns, 2 * E, steps, false);
            bool edge = on_edge(at, queries, call.window);
            for (int i = 0; i < E; i++)
                for (int half = 0; half < 2; half++) {
                    __m512 t = _mm512_mul_ps(_mm512_loadu_ps(s + i * E + 16 * half), factor);
                    if (edge)
                        t = _mm512_mask_mov_ps(never, Seen{at * E + i, call.window}.of(queries * E + 16 * half), t);
                    _mm512_storeu_ps(s + i * E + 16 * half, t);
                    most[half] = _mm512_max_ps(most[half], t);
                }
        }
        memset(sums, 0, block * 4);
        for (int64_t at = first; at <= queries; at++) {
            const float *s = scores + (at - first) * E * E;
            for (int i = 0; i < E; i += 2)
                for (int half = 0; half < 2; half++) {
                    __m512 even = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(s + i * E + 16 * half), most[half]));
                    __m512 odd = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(s + (i + 1) * E + 16 * half), most[half]));
                    total[half] = _mm512_add_ps(total[half], _mm512_add_ps(even, odd));
                    _mm512_storeu_si512(p + i * E + 32 * half,
                                        _mm512_permutexvar_epi16(alternating(), rounded(even, odd)));
                }
            for (int64_t j = 0; j < steps; j++)
                product(sums + j * E * E, values + at * block + j * E * E, E, p, 2 * E, 1, true);
        }
        __m512 one = _mm512_set1_ps(1);
        out.write(sums, _mm512_div_ps(one, total[0]), _mm512_div_ps(one, total[1]), queries);
        alignas(64) float tops[E], totals[E];
        for (int half = 0; half < 2; half++)
            _mm512_store_ps(tops + 16 * half, most[half]), _mm512_store_ps(totals + 16 * half, total[half]);
        for (int64_t i = 0; i < E && queries * E + i < q.length; i++)
            lse[queries * E + i] = tops[i] * LN2 + logf(totals[i]);
    }
}

static bool forward_row(const Call &call, int64_t row, int64_t head) {  // of a key head; false: memory lacks
    Head k = head_of(call.k, head, call, row), v = head_of(call.v, head, call, row);
    int64_t groups = call.heads / call.key_heads, block = E * k.wide, size = k.blocks() * block;
    if (!room.clear(size * 4 + block * 12 + k.blocks() * E * E * 4 + E * E * 2 + 1024)) return false;
    bf16 *keys = room.piece<bf16>(size), *values = room.piece<bf16>(size), *rows = room.piece<bf16>(block);
    float *scores = room.piece<float>(k.blocks() * E * E);
    for (int64_t at = 0; at < k.blocks(); at++) {
        k.read(keys + at * block, at);
        v.read(rows, at);
        turned(values + at * block, rows, k.wide);
    }
    Room before = room;
    for (int64_t g = 0; g < groups; g++, room = before)
        forward_head(call, row, head * groups + g, keys, values, scores);
    return true;
}

struct Keys {              // what all query heads of a key head share
    bf16 *k, *v, *turned;  // [length, wide], [length, wide], blocks of [wide, 32]
    float *dk, *dv;        // [length, wide]
};

static void backward_head(const Call &call, int64_t row, int64_t head, const Keys &shared) {
    Head q = head_of(call.q, head, call, row), dq = head_of(call.dq, head, call, row);
    Head out = head_of(call.out, head, call, row), dout = head_of(call.dout, head, call, row);
    int64_t wide = q.wide, block = E * wide, steps = wide / E, count = q.blocks(), size = count * block;
    bf16 *q_across = room.piece<bf16>(size), *q_paired = room.piece<bf16>(size);
    bf16 *g_across = room.piece<bf16>(size), *g_paired = room.piece<bf16>(size);
    bf16 *rows = room.piece<bf16>(block), *others = room.piece<bf16>(block);
    bf16 *p = room.piece<bf16>(E * E), *ds = room.piece<bf16>(E * E), *ds_paired = room.piece<bf16>(E * E);
    float *sums = room.piece<float>(size), *lse = room.piece<float>(count * E), *delta = room.piece<float>(count * E);
    float *s = room.piece<float>(E * E), *dp = room.piece<float>(E * E);
    const float *known = call.logs + head * call.tokens + call.borders[row];
    for (int64_t at = 0; at < count; at++) {
        q.read(rows, at);
        across(q_across + at * block, rows, wide), paired(q_paired + at * block, rows, wide);
        dout.read(rows, at), out.read(others, at);
        across(g_across + at * block, rows, wide), paired(g_paired + at * block, rows, wide);
        for (int64_t i = 0; i < E; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < wide; j += 32)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(rows + i * wide + j),
                                       (__m512bh)_mm512_loadu_si512(others + i * wide + j));
            delta[at * E + i] = _mm512_reduce_add_ps(sum);
            lse[at * E + i] = at * E + i < q.length ? known[at * E + i] * LOG2E : INFINITY;
        }
    }
    memset(sums, 0, size * 4);
    const __m512 factor = _mm512_set1_ps(call.scaling * LOG2E);
    for (int64_t keys = 0; keys < count; keys++) {
        for (int64_t queries = keys; queries < count && first_seen(queries, call.window) <= keys; queries++) {
            product(s, shared.k + keys * block, wide, q_across + queries * block, 2 * E, steps, false);
            product(dp, shared.v + keys * block, wide, g_across + queries * block, 2 * E, steps, false);
            bool edge = on_edge(keys, queries, call.window);
            const float *shift = lse + queries * E, *along = delta + queries * E;
            for (int i = 0; i < E; i += 2) {
                __m512 ps[2][2], grads[2][2];
                for (int odd = 0; odd < 2; odd++)
                    for (int half = 0; half < 2; half++) {
                        int place = (i + odd) * E + 16 * half;
                        __m512 t = exp2_of(
                            _mm512_fmsub_ps(_mm512_loadu_ps(s + place), factor, _mm512_loadu_ps(shift + 16 * half)));
                        if (edge)
                            t = _mm512_maskz_mov_ps(Seen{keys * E + i + odd, call.window}.of(queries * E + 16 * half),
                                                    t);
                        ps[odd][half] = t;
                        grads[odd][half] = _mm512_mul_ps(
                            t, _mm512_sub_ps(_mm512_loadu_ps(dp + place), _mm512_loadu_ps(along + 16 * half)));
                    }
                for (int odd = 0; odd < 2; odd++) {
                    _mm512_storeu_si512(p + (i + odd) * E, rounded(ps[odd][0], ps[odd][1]));
                    _mm512_storeu_si512(ds + (i + odd) * E, rounded(grads[odd][0], grads[odd][1]));
                }
                for (int half = 0; half < 2; half++)
                    _mm512_storeu_si512(
                        ds_paired + i * E + 32 * half,
                        _mm512_permutexvar_epi16(alternating(), rounded(grads[0][half], grads[1][half])));
            }
            for (int64_t j = 0; j < steps; j++) {
                product(shared.dv + keys * block + j * E, p, E, g_paired + queries * block + j * 2 * E, 2 * wide, 1,
                        true, wide);
                product(shared.dk + keys * block + j * E, ds, E, q_paired + queries * block + j * 2 * E, 2 * wide, 1,
                        true, wide);
                product(sums + queries * block + j * E * E, shared.turned + keys * block + j * E * E, E, ds_paired,
                        2 * E, 1, true);
            }
        }
    }
    const __m512 scaling = _mm512_set1_ps(call.scaling);
    for (int64_t at = 0; at < count; at++) dq.write(sums + at * block, scaling, scaling, at);
}

static bool backward_row(const Call &call, int64_t row, int64_t head) {  // of a key head; false: memory lacks
    Head k = head_of(call.k, head, call, row), v = head_of(call.v, head, call, row);
    Head dk = head_of(call.dk, head, call, row), dv = head_of(call.dv, head, call, row);
    int64_t groups = call.heads / call.key_heads, block = E * k.wide, count = k.blocks(), size = count * block;
    if (!room.clear(size * (3 * 2 + 2 * 4 + 4 * 2 + 4) + block * 4 + count * E * 8 + E * E * 14 + 2048)) return false;
    Keys shared = {room.piece<bf16>(size), room.piece<bf16>(size), room.piece<bf16>(size), room.piece<float>(size),
                   room.piece<float>(size)};
    for (int64_t at = 0; at < count; at++) {
        k.read(shared.k + at * block, at);
        v.read(shared.v + at * block, at);
        turned(shared.turned + at * block, shared.k + at * block, k.wide);
    }
    memset(shared.dk, 0, size * 4), memset(shared.dv, 0, size * 4);
    Room before = room;
    for (int64_t g = 0; g < groups; g++, room = before) backward_head(call, row, head * groups + g, shared);
    for (int64_t at = 0; at < count; at++) {
        dk.write_rows(shared.dk + at * block, call.scaling, at);
        dv.write_rows(shared.dv + at * block, 1, at);
    }
    return true;
}

static int for_all(const Call &call, bool (*work)(const Call &, int64_t, int64_t)) {  // 1: memory lacks
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        UsingTiles tiles;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < call.rows * call.key_heads; task++)
            failed |= !work(call, task / call.key_heads, task % call.key_heads);
    }
    return failed;
}

extern "C" int attention_forward(const Call *call) { return for_all(*call, forward_row); }

extern "C" int attention_backward(const Call *call) { return for_all(*call, backward_row); }

#endif
