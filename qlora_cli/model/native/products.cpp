// Sums of products in bfloat16 with a factor that is stored in 4 bits, unpacked where the product reads it.
//
// Knows AMX, and does without it on other processors; nothing of Python. Invariant: each element of a result is summed
// in float32, in an order that depends on shapes alone, and rounded once; the 4-bit factor is, bit for bit, what
// bitsandbytes dequantises.
//
// C [rows, columns] = sum of A_i B_i over the terms i. Both factors are laid out in blocks of 32 x 32, B in pairs of
// rows.

#ifndef __AMX_BF16__
extern "C" int products_ready() { return 0; }
#else

#include "blocks.h"

#include <omp.h>

#include <mutex>

static const int64_t CACHED = 1408 * 1024;  // bytes of A that a thread keeps in its second cache
static const int64_t DEEP = 8;              // blocks of the inner dimension of which A and B stay in the first
static const int64_t FEW = 4;               // blocks of rows for which each thread unpacks B for itself

struct Weight {                     // [outputs, inputs] in 4 bits, rows of whole blocks
    const uint8_t *codes;           // two in a byte, the first in its upper half
    const float *table;             // [16] what codes mean
    const void *constants;          // by block: float32, or where they are nested, uint8
    const float *nested, *meaning;  // by 256 constants, and [256]; null where they are not
    float offset;
    int64_t inputs, shift;  // 2 to the power of shift values are a block

    float constant(int64_t block) const {
        if (!nested) return ((const float *)constants)[block];
        return meaning[((const uint8_t *)constants)[block]] * nested[block >> 8] + offset;
    }
    __m512i read(int64_t output, int64_t input, __m512 values) const {  // 32 values of a row
        int64_t at = output * inputs + input;
        __m128i both = _mm_loadu_si128((const __m128i *)(codes + at / 2)), half = _mm_set1_epi8(15);
        __m128i even = _mm_and_si128(_mm_srli_epi16(both, 4), half), odd = _mm_and_si128(both, half);
        __m512 factor = _mm512_set1_ps(constant(at >> shift));
        __m512 low = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)), values);
        __m512 high = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, odd)), values);
        return rounded(_mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor));
    }
};

struct Term {
    const bf16 *a;  // [rows, inner]
    int64_t a_stride;
    const bf16 *b;  // [inner, columns] or, if b_turned, [columns, inner]; null: the weight is
    int64_t b_stride, b_turned, inner;
    const Weight *weight;  // [inner, columns] or, if b_turned, [columns, inner]
    int64_t wide() const { return (inner + E - 1) / E * E; }

    // 32 of B's inner dimension, from `at` on, for 32 columns
    void pack(bf16 *into, int64_t at, int64_t column) const {
        int64_t left = inner - at < E ? inner - at : E;
        __m512 values = weight ? _mm512_loadu_ps(weight->table) : _mm512_setzero_ps();
        if (b_turned) {
            __mmask32 given = left == E ? ~0u : (1u << left) - 1;
            for (int half = 0; half < 2; half++, into += E * E / 2) {
                __m512i r[16];
                for (int i = 0; i < 16; i++) {
                    int64_t row = column + 16 * half + i;
                    r[i] = weight ? weight->read(row, at, values)
                                  : _mm512_maskz_loadu_epi16(given, b + row * b_stride + at);
                }
                transpose(r);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(into + i * E, r[i]);
            }
            return;
        }
        for (int i = 0; i < E; i += 2, into += E) {
            __m512i two[2];
            for (int odd = 0; odd < 2; odd++) {
                int64_t row = at + i + odd;
                if (i + odd >= left)
                    two[odd] = _mm512_setzero_si512();
                else
                    two[odd] =
                        weight ? weight->read(row, column, values) : _mm512_loadu_si512(b + row * b_stride + column);
            }
            __m512i low = _mm512_inserti64x4(two[0], _mm512_castsi512_si256(two[1]), 1);
            __m512i high = _mm512_inserti64x4(two[1], _mm512_extracti64x4_epi64(two[0], 1), 0);
            _mm512_storeu_si512(into, _mm512_permutexvar_epi16(alternating(), low));
            _mm512_storeu_si512(into + E * E / 2, _mm512_permutexvar_epi16(alternating(), high));
        }
    }

    // [32, wide] of A from `row` on, in blocks of [32, 32]; zeros after the end
    void copy(bf16 *into, int64_t row, int64_t rows) const {
        for (int64_t at = 0; at < inner; at += E, into += E * E) {
            __mmask32 given = inner - at >= E ? ~0u : (1u << (inner - at)) - 1;
            for (int64_t i = 0; i < E; i++) {
                __mmask32 here = row + i < rows ? given : 0;
                _mm512_storeu_si512(into + i * E, _mm512_maskz_loadu_epi16(here, a + (row + i) * a_stride + at));
            }
        }
    }
};

struct Product {
    bf16 *c;  // [rows, columns]; columns are whole blocks
    int64_t c_stride, rows, columns;
    const bf16 *bias;  // [columns] or null
    const Term *terms;
    int64_t count;

    int64_t blocks() const { return (rows + E - 1) / E; }
    int64_t steps() const {  // blocks of the inner dimension
        int64_t sum = 0;
        for (int64_t i = 0; i < count; i++) sum += terms[i].wide() / E;
        return sum;
    }
    void pack(bf16 *into, int64_t column) const {  // 32 columns of all B
        for (int64_t i = 0; i < count; i++)
            for (int64_t at = 0; at < terms[i].inner; at += E, into += E * E) terms[i].pack(into, at, column);
    }
    void copy(bf16 *into, int64_t first, int64_t last) const {  // these blocks of rows of all A
        for (int64_t block = first; block < last; block++)
            for (int64_t i = 0; i < count; into += E * terms[i++].wide()) terms[i].copy(into, block * E, rows);
    }
};

// sums [2, 2, 16, 16] = a b, or += a b, of blocks that lie one after the other; meanwhile `lines` of 64 bytes a block
// are fetched from `next` on, for what comes after
static inline void sum_blocks(float *sums, const bf16 *a, const bf16 *b, int64_t blocks, bool add, const bf16 *next,
                              int64_t lines) {
    asm volatile("" ::: "memory");
    if (add) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t block = 0; block < blocks; block++, a += E * E, b += E * E) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + E * E / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + E * E / 2, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (int64_t line = 0; line < lines; line++, next += 32) _mm_prefetch(next, _MM_HINT_T1);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

static void write_block(const Product &product, const float *sums, int64_t row, int64_t column) {
    __m512 low = _mm512_setzero_ps(), high = low;
    if (product.bias) {
        __m512i both = _mm512_loadu_si512(product.bias + column);
        low = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
        high = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
    }
    for (int64_t i = 0; i < E && row + i < product.rows; i++) {
        const float *from = sums + i / 16 * 512 + i % 16 * 16;
        __m512 left = _mm512_loadu_ps(from), right = _mm512_loadu_ps(from + 256);
        if (product.bias) left = _mm512_add_ps(left, low), right = _mm512_add_ps(right, high);
        _mm512_storeu_si512(product.c + (row + i) * product.c_stride + column, rounded(left, right));
    }
}

// 32 columns, of which `b` holds all B, for blocks [first, last) of rows, of which `a` holds all A
static void multiply_panel(const Product &product, const bf16 *a, int64_t first, int64_t last, const bf16 *b,
                           int64_t column, float *sums) {
    int64_t steps = product.steps(), pieces = steps / DEEP > 0 ? steps / DEEP : 1;
    int64_t lines = (E + last - first - 1) / (last - first);
    const bf16 *next = b + steps * E * E;
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t at = piece * steps / pieces, count = (piece + 1) * steps / pieces - at;
        for (int64_t block = 0; block < last - first; block++, next += lines * count * E)
            sum_blocks(sums + block * E * E, a + (block * steps + at) * E * E, b + at * E * E, count, piece > 0, next,
                       lines);
    }
    for (int64_t block = first; block < last; block++)
        write_block(product, sums + (block - first) * E * E, block * E, column);
}

// Each thread takes all rows to columns that it unpacks for itself.
static int multiply_few_rows(const Product &product) {
    int64_t blocks = product.blocks(), steps = product.steps();
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        UsingTiles tiles;
        failed = !room.clear((blocks + 1) * steps * E * E * 2 + blocks * E * E * 4 + 192);
        bf16 *a = room.piece<bf16>(blocks * steps * E * E), *b = room.piece<bf16>(steps * E * E);
        float *sums = room.piece<float>(blocks * E * E);
        if (!failed) product.copy(a, 0, blocks);
#pragma omp for schedule(dynamic, 1)
        for (int64_t column = 0; column < product.columns; column += E) {
            if (failed) continue;
            product.pack(b, column);
            multiply_panel(product, a, 0, blocks, b, column, sums);
        }
    }
    return failed;
}

static Room shared;  // all B; one product at a time
static std::mutex in_use;

// All columns are unpacked once, for all threads; each thread takes as many rows to them as stay in its cache.
static int multiply_many_rows(const Product &product) {
    std::lock_guard<std::mutex> alone(in_use);
    int64_t blocks = product.blocks(), steps = product.steps(), threads = omp_get_max_threads();
    int64_t most = CACHED / (steps * E * E * 2) > 0 ? CACHED / (steps * E * E * 2) : 1;
    int64_t chunks = ((blocks + most - 1) / most + threads - 1) / threads * threads;
    if (!shared.clear(steps * E * product.columns * 2)) return 1;
    int failed = 0;
    bf16 *all = shared.piece<bf16>(steps * E * product.columns);
#pragma omp parallel reduction(| : failed)
    {
        UsingTiles tiles;
#pragma omp for schedule(dynamic, 1)
        for (int64_t column = 0; column < product.columns; column += E) product.pack(all + column * steps * E, column);
#pragma omp for schedule(dynamic, 1)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t first = chunk * blocks / chunks, last = (chunk + 1) * blocks / chunks;
            if (first == last) continue;
            failed |= !room.clear((last - first) * E * E * (steps * 2 + 4) + 128);
            if (failed) continue;
            bf16 *a = room.piece<bf16>((last - first) * steps * E * E);
            float *sums = room.piece<float>((last - first) * E * E);
            product.copy(a, first, last);
            for (int64_t column = 0; column < product.columns; column += E)
                multiply_panel(product, a, first, last, all + column * steps * E, column, sums);
        }
    }
    return failed;
}

extern "C" int products_ready() { return amx; }

// 1: there is not enough memory
extern "C" int multiply(const Product *product) {
    return product->blocks() <= FEW ? multiply_few_rows(*product) : multiply_many_rows(*product);
}

#endif
