// RMSNorm, rotary positions and the gated activations of an MLP on bfloat16 tensors, computed in float32 and rounded
// once.
//
// Knows pointers and sizes; nothing of Python. Plain loops, which the compiler turns into vectors. Invariant: a row, or
// an element, is computed by one thread, in the same order however many threads there are.

#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint16_t bf16;

static const int64_t FEW = 16384;   // elements that one thread does faster than it wakes another
static const int64_t PIECE = 2048;  // elements that a thread does at a time: larger pieces took a third longer

static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

static inline bf16 narrow(float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest;
}

static inline float add_product(float a, float b, float c) {  // a b + c
#ifdef __FMA__
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline float exp_of(float x) {  // 2e-7 relative
    x = x < -87 ? -87 : x;
    x = x > 88 ? 88 : x;
    float whole = rintf(x * 1.44269504f);
    float rest = add_product(whole, 2.12194440e-4f, add_product(whole, -0.693359375f, x));
    float y = 1.9875691500e-4f;
    y = add_product(y, rest, 1.3981999507e-3f);
    y = add_product(y, rest, 8.3334519073e-3f);
    y = add_product(y, rest, 4.1665795894e-2f);
    y = add_product(y, rest, 1.6666665459e-1f);
    y = add_product(y, rest, 5.0000001201e-1f);
    y = add_product(y, rest * rest, rest + 1);
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

struct Silu {
    static inline float share(float x) { return 1 / (1 + exp_of(-x)); }
    static inline float value(float x) { return x * share(x); }
    static inline float slope(float x) {
        float s = share(x);
        return s * (1 + x * (1 - s));
    }
};

struct GeluTanh {  // x times the share 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
    static inline float share(float x) { return 1 / (1 + exp_of(-1.59576912f * x * (1 + 0.044715f * x * x))); }
    static inline float value(float x) { return x * share(x); }
    static inline float slope(float x) {
        float s = share(x);
        return s + x * s * (1 - s) * 1.59576912f * (1 + 0.134145f * x * x);
    }
};

template <class Activation>
static void forward(bf16 *result, const bf16 *gate, const bf16 *up, int64_t count) {
#pragma omp parallel for schedule(dynamic, 1) if (count > FEW)
    for (int64_t first = 0; first < count; first += PIECE) {
        int64_t last = first + PIECE < count ? first + PIECE : count;
#pragma omp simd
        for (int64_t i = first; i < last; i++) result[i] = narrow(Activation::value(wide(gate[i])) * wide(up[i]));
    }
}

template <class Activation>
static void backward(bf16 *dgate, bf16 *dup, const bf16 *dy, const bf16 *gate, const bf16 *up, int64_t count) {
#pragma omp parallel for schedule(dynamic, 1) if (count > FEW)
    for (int64_t first = 0; first < count; first += PIECE) {
        int64_t last = first + PIECE < count ? first + PIECE : count;
#pragma omp simd
        for (int64_t i = first; i < last; i++) {
            float x = wide(gate[i]), d = wide(dy[i]);
            dgate[i] = narrow(d * wide(up[i]) * Activation::slope(x));
            dup[i] = narrow(d * Activation::value(x));
        }
    }
}

struct Rotation {  // of [batch, heads, tokens, width], by angles [batch, tokens, width]; the last stride is 1
    bf16 *to;
    const bf16 *from, *cosine, *sine;
    int64_t to_batch, to_head, to_token, from_batch, from_head, from_token, angle_batch, angle_token;
    int64_t batch, heads, tokens, width, back;  // back: by the transposed matrix
};

// halves (x, y) -> (x cos - y sin, y cos' + x sin'), where ' is the second half; back: (x cos + y sin', y cos' - x sin)
static void rotate_row(bf16 *to, const bf16 *from, const bf16 *cosine, const bf16 *sine, int64_t half, bool back) {
    for (int64_t i = 0; i < half; i++) {
        float x = wide(from[i]), y = wide(from[i + half]);
        float first = wide(sine[i]), second = wide(sine[i + half]);
        to[i] = narrow(x * wide(cosine[i]) + y * (back ? second : -first));
        to[i + half] = narrow(y * wide(cosine[i + half]) + x * (back ? -first : second));
    }
}

extern "C" {

void rotate(const Rotation *given) {
    const Rotation &r = *given;
#pragma omp parallel for collapse(2) if (r.batch * r.heads * r.tokens * r.width > FEW)
    for (int64_t b = 0; b < r.batch; b++)
        for (int64_t t = 0; t < r.tokens; t++) {
            const bf16 *cosine = r.cosine + b * r.angle_batch + t * r.angle_token;
            const bf16 *sine = r.sine + b * r.angle_batch + t * r.angle_token;
            for (int64_t h = 0; h < r.heads; h++)
                rotate_row(r.to + b * r.to_batch + h * r.to_head + t * r.to_token,
                           r.from + b * r.from_batch + h * r.from_head + t * r.from_token, cosine, sine, r.width / 2,
                           r.back);
        }
}

void silu_forward(bf16 *result, const bf16 *gate, const bf16 *up, int64_t count) {
    forward<Silu>(result, gate, up, count);
}

void gelu_tanh_forward(bf16 *result, const bf16 *gate, const bf16 *up, int64_t count) {
    forward<GeluTanh>(result, gate, up, count);
}

void silu_backward(bf16 *dgate, bf16 *dup, const bf16 *dy, const bf16 *gate, const bf16 *up, int64_t count) {
    backward<Silu>(dgate, dup, dy, gate, up, count);
}

void gelu_tanh_backward(bf16 *dgate, bf16 *dup, const bf16 *dy, const bf16 *gate, const bf16 *up, int64_t count) {
    backward<GeluTanh>(dgate, dup, dy, gate, up, count);
}

// y [rows, width] = x scale weight, scale [rows] = 1 / rms(x)
void norm_forward(bf16 *y, float *scale, const bf16 *x, const float *weight, float eps, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > FEW)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = x + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += wide(from[i]) * wide(from[i]);
        float factor = scale[row] = 1 / sqrtf(sum / width + eps);
        for (int64_t i = 0; i < width; i++) y[row * width + i] = narrow(wide(from[i]) * factor * weight[i]);
    }
}

// dx = (dy weight - n mean(dy weight n)) scale, n = x scale
void norm_backward(bf16 *dx, const bf16 *dy, const bf16 *x, const float *weight, const float *scale, int64_t rows,
                   int64_t width) {
#pragma omp parallel for if (rows * width > FEW)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = x + row * width, *grad = dy + row * width;
        float sum = 0, factor = scale[row];
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += wide(grad[i]) * weight[i] * wide(from[i]);
        float along = sum * factor / width;
        for (int64_t i = 0; i < width; i++)
            dx[row * width + i] = narrow((wide(grad[i]) * weight[i] - wide(from[i]) * factor * along) * factor);
    }
}
}
