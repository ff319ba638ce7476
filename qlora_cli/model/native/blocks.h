// Products of bfloat16 blocks with sums in float32, and how their factors must lie in memory.
//
// Knows the bfloat16 units of x86 processors, AMX or AVX512-BF16. In a product C += A B, A is [32, 32 n] by rows, and B
// [32 n, 32] by pairs of rows, [16 n, 32, 2], as the units read them.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef uint16_t bf16;

static const int E = 32;  // rows or columns of a block

#ifdef __AMX_BF16__
static const bool amx = !syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM: may this process use tiles' data?

struct alignas(64) Tiles {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

static const Tiles SQUARE = {// all eight of 16 rows of 64 bytes
                             1,
                             0,
                             {},
                             {64, 64, 64, 64, 64, 64, 64, 64},
                             {16, 16, 16, 16, 16, 16, 16, 16}};

class UsingTiles {  // what was set before is set again
    Tiles before;

    // In GCC 12 these do not say that they read or write more than eight bytes, nor loading a tile that it reads
    // memory.
    static void load(const Tiles &tiles) {
        asm volatile("" ::"r"(&tiles) : "memory");
        _tile_loadconfig(&tiles);
    }

  public:
    UsingTiles() {
        if (!amx) return;
        _tile_storeconfig(&before);
        load(SQUARE);
    }
    ~UsingTiles() {
        if (!amx) return;
        if (before.palette)
            load(before);
        else
            _tile_release();
    }
};

static inline void product_amx(float *c, const bf16 *a, int64_t lda, const bf16 *b, int64_t ldb, int steps, bool add,
                               int64_t ldc) {
    float *low = c + 16 * ldc;
    asm volatile("" ::: "memory");
    if (add) {
        _tile_loadd(0, c, ldc * 4);
        _tile_loadd(1, c + 16, ldc * 4);
        _tile_loadd(2, low, ldc * 4);
        _tile_loadd(3, low + 16, ldc * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int step = 0; step < steps; step++, a += 32, b += 16 * ldb) {
        _tile_loadd(4, a, lda * 2);
        _tile_loadd(5, a + 16 * lda, lda * 2);
        _tile_loadd(6, b, ldb * 2);
        _tile_loadd(7, b + 32, ldb * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
    _tile_stored(2, low, ldc * 4);
    _tile_stored(3, low + 16, ldc * 4);
}
#else
static const bool amx = false;

struct UsingTiles {
    UsingTiles() {}
};
#endif

static inline void product_avx(float *c, const bf16 *a, int64_t lda, const bf16 *b, int64_t ldb, int steps, bool add,
                               int64_t ldc) {
    for (int top = 0; top < E; top += 8) {
        __m512 sums[8][2];
        for (int i = 0; i < 8; i++)
            for (int h = 0; h < 2; h++)
                sums[i][h] = add ? _mm512_loadu_ps(c + (top + i) * ldc + 16 * h) : _mm512_setzero_ps();
        for (int pair = 0; pair < 16 * steps; pair++) {
            __m512bh left = (__m512bh)_mm512_loadu_si512(b + pair * ldb),
                     right = (__m512bh)_mm512_loadu_si512(b + pair * ldb + 32);
            for (int i = 0; i < 8; i++) {
                int32_t both;
                memcpy(&both, a + (top + i) * lda + 2 * pair, 4);
                __m512bh row = (__m512bh)_mm512_set1_epi32(both);
                sums[i][0] = _mm512_dpbf16_ps(sums[i][0], row, left),
                sums[i][1] = _mm512_dpbf16_ps(sums[i][1], row, right);
            }
        }
        for (int i = 0; i < 8; i++)
            for (int h = 0; h < 2; h++) _mm512_storeu_ps(c + (top + i) * ldc + 16 * h, sums[i][h]);
    }
}

// c [32, 32] = a b, or c += a b, over 32 * steps of the inner dimension
static inline void product(float *c, const bf16 *a, int64_t lda, const bf16 *b, int64_t ldb, int steps, bool add,
                           int64_t ldc = E) {
#ifdef __AMX_BF16__
    if (amx) return product_amx(c, a, lda, b, ldb, steps, add, ldc);
#endif
    product_avx(c, a, lda, b, ldb, steps, add, ldc);
}

static inline __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

static inline __m512i alternating() {  // indices that make pairs of the two halves
    alignas(64) static const uint16_t places[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_load_si512(places);
}

static inline void transpose(__m512i r[16]) {  // 16 x 16 elements of 32 bits
    __m512i t[16];
    for (int i = 0; i < 16; i += 2)
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88),
              t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88),
              r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

class Room {  // memory of a thread, cut into pieces; it grows, and is kept
    char *data = nullptr;
    size_t size = 0, used = 0;

  public:
    bool clear(size_t bytes) {  // false: there is not so much
        used = 0;
        if (bytes <= size) return true;
        free(data);
        size = (bytes + 63) / 64 * 64;
        data = (char *)aligned_alloc(64, size);
        if (!data) size = 0;
        return data;
    }
    template <class T>
    T *piece(int64_t count) {
        T *found = (T *)(data + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return found;
    }
};

static thread_local Room room;

static inline void across(bf16 *into, const bf16 *rows, int64_t wide) {  // [32, wide] -> [wide / 2, 32, 2]: B of K Q^T
    for (int64_t at = 0; at < wide; at += 32)
        for (int half = 0; half < 2; half++) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows + (16 * half + i) * wide + at);
            transpose(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(into + ((at / 2 + i) * E + 16 * half) * 2, r[i]);
        }
}

static inline void paired(bf16 *into, const bf16 *rows, int64_t wide) {  // [32, wide] -> [16, wide, 2]: B of P^T dO
    for (int64_t i = 0; i < E; i += 2)
        for (int64_t at = 0; at < wide; at += 16) {
            __m256i even = _mm256_loadu_si256((const __m256i *)(rows + i * wide + at)),
                    odd = _mm256_loadu_si256((const __m256i *)(rows + (i + 1) * wide + at));
            __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
            _mm512_storeu_si512(into + (i * wide + at * 2), _mm512_permutexvar_epi16(alternating(), both));
        }
}

static inline void turned(bf16 *into, const bf16 *rows, int64_t wide) {  // [32, wide] -> [wide, 32]
    for (int64_t at = 0; at < wide; at++)
        for (int64_t i = 0; i < E; i++) into[at * E + i] = rows[i * wide + at];
}
