// Decoder layers for few rows on a CPU, fused: what is left beside reading the weights is nearly free. Plain C interface.
//
// Matrices are tiles of 16 outputs. In a tile, 32 inputs at a time: 4 bits: 256 bytes, vector j of 4 holds inputs
// 4j..4j+3 of each output in low nibbles and 16+4j.. in high ones, then 16 half-precision scales (4.5 bits per weight);
// 8 bits: 8 vectors, then the scales (8.5 bits); 16 bits: bfloat16, two inputs at a time; 32 bits: one. Lane r is output r,
// so sums need no reduction across lanes and a scale is used once per 32 inputs. Activations are rounded to 8 bits per
// 32 inputs for 4- and 8-bit weights (as llama.cpp does). Integer products by AVX-512 VNNI, AVX2 or NEON dot product.
// Keys and values lie in blocks of 32 positions, (block, head, position, head size), float32 or bfloat16.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

typedef float vf __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(64), aligned(4)));
enum { LANES = 16, GROUP = 32, BLOCK = 32, ROWS = 4, RUN = 16 };
enum { SILU, GELU, GELU_TANH, RELU };

extern "C" {
struct Matrix {
    const uint8_t* data;
    const float* bias;
    int32_t outputs, inputs, bits;
};
struct Norm {
    const float *weight, *bias;
};
struct Layer {
    Matrix qkv, output, gate_up, down, shared_gate_up, shared_down;
    Norm attention_norm, attention_post_norm, ffn_norm, ffn_post_norm;
    const float *q_norm, *k_norm, *router, *shared_router;
    const Matrix *expert_gate_up, *expert_down;
    void *keys, *values;
    int32_t window, rope, sparse;
};
struct Rope {
    const float* frequencies;
    float scale;
    int32_t half;
};
struct Model {
    const Rope* ropes;
    int32_t width, heads, kv_heads, head_size, activation, gated, post_norms, parallel, bf16_cache;
    int32_t experts, experts_per_token, normalise, threads;
    float epsilon, scale, softcap;
};
struct Step {
    int32_t tokens;
    const int32_t *positions, *table_of_token, *tables;  // token t's block b is tables[table_of_token[t] + b]
};
}

namespace {
inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf all(float x) { return vf{} + x; }
inline float from_bf16(uint16_t b) { uint32_t u = uint32_t(b) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline uint16_t to_bf16(float f) {
    uint32_t u; std::memcpy(&u, &f, 4);
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// exp to 2e-7 relative: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients).
inline vf vexp(vf x) {
    x = x < all(-87.0f) ? all(-87.0f) : x;
    x = x > all(88.0f) ? all(88.0f) : x;
    const vf magic = all(12582912.0f);
    vf n = (x * 1.44269504f + magic) - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = ((((all(1.9875691500e-4f) * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
            1.6666665459e-1f) * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
    vf power; std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// ---- activations -------------------------------------------------------------------------------------------------
struct Activations {
    std::vector<int8_t> q;
    std::vector<float> scale;     // per row and group of 32
    std::vector<int32_t> sum;     // of q, likewise
    std::vector<uint16_t> half;   // bfloat16 of the whole row
    std::vector<float> wide;      // padded float32, where there is no bfloat16 product
    int padded = 0;
};

void prepare(Activations& a, const float* x, int rows, int inputs, int bits) {
    const int padded = (inputs + GROUP - 1) / GROUP * GROUP, groups = padded / GROUP;
    a.padded = padded;
    if (bits >= 16) {
        a.half.assign(size_t(rows) * padded, 0);
        a.wide.assign(size_t(rows) * padded, 0);
        for (int m = 0; m < rows; m++)
            for (int k = 0; k < inputs; k++) {
                a.wide[size_t(m) * padded + k] = x[size_t(m) * inputs + k];
                a.half[size_t(m) * padded + k] = to_bf16(x[size_t(m) * inputs + k]);
            }
        return;
    }
    a.q.resize(size_t(rows) * padded);
    a.scale.resize(size_t(rows) * groups);
    a.sum.resize(size_t(rows) * groups);
    for (int m = 0; m < rows; m++)
        for (int g = 0; g < groups; g++) {
            float v[GROUP] = {};
            const int count = std::min<int>(GROUP, inputs - g * GROUP);
            std::memcpy(v, x + size_t(m) * inputs + g * GROUP, count * sizeof(float));
            float top = 0;
#pragma omp simd reduction(max : top)
            for (int i = 0; i < GROUP; i++) top = std::max(top, std::fabs(v[i]));
            const float inverse = top > 0 ? 127.0f / top : 0.0f;
            int8_t* q = &a.q[size_t(m) * padded + g * GROUP];
            int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < GROUP; i++) {
                const float r = (v[i] * inverse + 12582912.0f) - 12582912.0f;
                q[i] = int8_t(int32_t(r));
                sum += int32_t(r);
            }
            a.scale[size_t(m) * groups + g] = top / 127.0f;
            a.sum[size_t(m) * groups + g] = sum;
        }
}

// ---- 16 outputs at once: products of unsigned weights with 4 signed activations, added in 32 bits ----------------------
template <int BITS> struct Offset { static constexpr int stored = BITS == 4 ? 8 : 128; };
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Bytes { __m512i v; };
struct Sums { __m512i v; };
template <int BITS> constexpr int correction() { return Offset<BITS>::stored; }
inline Bytes bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low(Bytes b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
inline Bytes high(Bytes b) { return {_mm512_and_si512(_mm512_srli_epi16(b.v, 4), _mm512_set1_epi8(15))}; }
inline Sums start(int32_t x) { return {_mm512_set1_epi32(x)}; }
template <int BITS> inline Sums dot(Sums s, Bytes w, const int8_t* x) {
    int32_t four; std::memcpy(&four, x, 4);
    return {_mm512_dpbusd_epi32(s.v, w.v, _mm512_set1_epi32(four))};
}
inline vf floats(Sums s) { return (vf)_mm512_cvtepi32_ps(s.v); }
#elif defined(__AVX2__)
struct Bytes { __m256i a, b; };
struct Sums { __m256i a, b; };
template <int BITS> constexpr int correction() { return BITS == 4 ? 8 : 0; }
inline Bytes bytes(const uint8_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}; }
inline Bytes low(Bytes x) { const __m256i m = _mm256_set1_epi8(15); return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)}; }
inline Bytes high(Bytes x) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
inline Sums start(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline __m256i four_products(__m256i s, __m256i w, __m256i x) {
    return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
template <int BITS> inline Sums dot(Sums s, Bytes w, const int8_t* x) {
    int32_t four; std::memcpy(&four, x, 4);
    const __m256i y = _mm256_set1_epi32(four);
    if (BITS == 4) return {four_products(s.a, w.a, y), four_products(s.b, w.b, y)};
    // Sixteen-bit sums of two products would overflow for unsigned 8-bit weights: the sign moves to the activations.
    const __m256i o = _mm256_set1_epi8(-128), a = _mm256_xor_si256(w.a, o), b = _mm256_xor_si256(w.b, o);
    return {four_products(s.a, _mm256_abs_epi8(a), _mm256_sign_epi8(y, a)),
            four_products(s.b, _mm256_abs_epi8(b), _mm256_sign_epi8(y, b))};
}
inline vf floats(Sums s) {
    vf made;
    const __m256 a = _mm256_cvtepi32_ps(s.a), b = _mm256_cvtepi32_ps(s.b);
    std::memcpy(&made, &a, 32); std::memcpy((char*)&made + 32, &b, 32);
    return made;
}
#elif defined(__ARM_FEATURE_DOTPROD)
struct Bytes { uint8x16_t v[4]; };
struct Sums { int32x4_t v[4]; };
template <int BITS> constexpr int correction() { return 0; }
inline Bytes bytes(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
inline Bytes low(Bytes b) { for (auto& v : b.v) v = vandq_u8(v, vdupq_n_u8(15)); return b; }
inline Bytes high(Bytes b) { for (auto& v : b.v) v = vshrq_n_u8(v, 4); return b; }
inline Sums start(int32_t x) { Sums s; for (auto& v : s.v) v = vdupq_n_s32(x); return s; }
template <int BITS> inline Sums dot(Sums s, Bytes w, const int8_t* x) {
    int32_t four; std::memcpy(&four, x, 4);
    const int8x16_t y = vreinterpretq_s8_s32(vdupq_n_s32(four));
    for (int i = 0; i < 4; i++)
        s.v[i] = vdotq_s32(s.v[i], vreinterpretq_s8_u8(vsubq_u8(w.v[i], vdupq_n_u8(Offset<BITS>::stored))), y);
    return s;
}
inline vf floats(Sums s) {
    vf made;
    for (int i = 0; i < 4; i++) { const float32x4_t f = vcvtq_f32_s32(s.v[i]); std::memcpy((char*)&made + 16 * i, &f, 16); }
    return made;
}
#else
struct Bytes { uint8_t v[64]; };
struct Sums { int32_t v[16]; };
template <int BITS> constexpr int correction() { return Offset<BITS>::stored; }
inline Bytes bytes(const uint8_t* p) { Bytes b; std::memcpy(b.v, p, 64); return b; }
inline Bytes low(Bytes b) { for (auto& v : b.v) v &= 15; return b; }
inline Bytes high(Bytes b) { for (auto& v : b.v) v >>= 4; return b; }
inline Sums start(int32_t x) { Sums s; for (auto& v : s.v) v = x; return s; }
template <int BITS> inline Sums dot(Sums s, Bytes w, const int8_t* x) {
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 4; i++) s.v[r] += int32_t(w.v[4 * r + i]) * x[i];
    return s;
}
inline vf floats(Sums s) { vf made; for (int r = 0; r < 16; r++) made[r] = float(s.v[r]); return made; }
#endif

inline vf half_scales(const uint8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    vf made;
    const __m256 a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)));
    std::memcpy(&made, &a, 32); std::memcpy((char*)&made + 32, &b, 32);
    return made;
#else
    vf made;
    for (int r = 0; r < 16; r++) { _Float16 h; std::memcpy(&h, p + 2 * r, 2); made[r] = float(h); }
    return made;
#endif
}

template <int BITS, int M> void integer_tile(const uint8_t* w, const Activations& a, int row, vf* total) {
    const int groups = a.padded / GROUP;
    const int8_t* q = &a.q[size_t(row) * a.padded];
    const float* scale = &a.scale[size_t(row) * groups];
    const int32_t* sum = &a.sum[size_t(row) * groups];
    for (int m = 0; m < M; m++) total[m] = vf{};
    for (int g = 0; g < groups; g++) {
        Sums s[M], t[M];
        for (int m = 0; m < M; m++) s[m] = start(-correction<BITS>() * sum[m * groups + g]), t[m] = start(0);
        const int8_t* x = q + g * GROUP;
        if (BITS == 4) {
            for (int j = 0; j < 4; j++) {
                const Bytes both = bytes(w + 64 * j), l = low(both), h = high(both);
                for (int m = 0; m < M; m++) {
                    s[m] = dot<4>(s[m], l, x + size_t(m) * a.padded + 4 * j);
                    t[m] = dot<4>(t[m], h, x + size_t(m) * a.padded + 16 + 4 * j);
                }
            }
            w += 256;
        } else {
            for (int j = 0; j < 8; j += 2) {
                const Bytes l = bytes(w + 64 * j), h = bytes(w + 64 * j + 64);
                for (int m = 0; m < M; m++) {
                    s[m] = dot<8>(s[m], l, x + size_t(m) * a.padded + 4 * j);
                    t[m] = dot<8>(t[m], h, x + size_t(m) * a.padded + 4 * j + 4);
                }
            }
            w += 512;
        }
        const vf d = half_scales(w);
        w += 32;
        for (int m = 0; m < M; m++) total[m] += (floats(s[m]) + floats(t[m])) * (d * scale[m * groups + g]);
    }
}

template <int M> void float_tile(const uint8_t* w, const Activations& a, int row, vf* total) {
    vf part[2][M] = {};
    for (int k = 0; k < a.padded; k += 4)
        for (int j = 0; j < 2; j++, w += 64) {
#if defined(__AVX512BF16__)
            const __m512bh v = (__m512bh)_mm512_loadu_si512(w);
            for (int m = 0; m < M; m++) {
                int32_t two; std::memcpy(&two, &a.half[size_t(row + m) * a.padded + k + 2 * j], 4);
                part[j][m] = (vf)_mm512_dpbf16_ps((__m512)part[j][m], v, (__m512bh)_mm512_set1_epi32(two));
            }
#else
            vu v; std::memcpy(&v, w, 64);
            const vu first = v << 16, second = v & 0xffff0000u;
            vf f, s; std::memcpy(&f, &first, 64); std::memcpy(&s, &second, 64);
            for (int m = 0; m < M; m++) {
                const float* x = &a.wide[size_t(row + m) * a.padded + k + 2 * j];
                part[j][m] += f * x[0] + s * x[1];
            }
#endif
        }
    for (int m = 0; m < M; m++) total[m] = part[0][m] + part[1][m];
}

template <int M> void single_tile(const uint8_t* w, const Activations& a, int row, vf* total) {
    vf part[2][M] = {};
    for (int k = 0; k < a.padded; k += 2)
        for (int j = 0; j < 2; j++, w += 64) {
            const vf v = load((const float*)w);
            for (int m = 0; m < M; m++) part[j][m] += v * a.wide[size_t(row + m) * a.padded + k + j];
        }
    for (int m = 0; m < M; m++) total[m] = part[0][m] + part[1][m];
}

inline size_t group_bytes(int bits) { return bits == 4 ? 288 : bits == 8 ? 544 : bits == 16 ? 1024 : 2048; }

template <int M> void tile(const Matrix& w, const uint8_t* data, const Activations& a, int row, vf* total) {
    if (w.bits == 4) integer_tile<4, M>(data, a, row, total);
    else if (w.bits == 8) integer_tile<8, M>(data, a, row, total);
    else if (w.bits == 16) float_tile<M>(data, a, row, total);
    else single_tile<M>(data, a, row, total);
}

// y (rows, outputs) = w x + bias, or added to y.
void multiply(const Matrix& w, const Activations& a, int rows, float* y, bool add, int threads) {
    const int tiles = (w.outputs + LANES - 1) / LANES;
    const size_t bytes_of_tile = size_t(a.padded / GROUP) * group_bytes(w.bits);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int n = 0; n < tiles; n++) {
        const uint8_t* data = w.data + n * bytes_of_tile;
        const int count = std::min<int>(LANES, w.outputs - n * LANES);
        for (int row = 0; row < rows; row += ROWS) {
            vf total[ROWS];
            const int many = std::min<int>(ROWS, rows - row);
            if (many == 1) tile<1>(w, data, a, row, total);
            else if (many == 2) tile<2>(w, data, a, row, total);
            else if (many == 3) tile<3>(w, data, a, row, total);
            else tile<4>(w, data, a, row, total);
            for (int m = 0; m < many; m++) {
                float* out = y + size_t(row + m) * w.outputs + n * LANES;
                for (int r = 0; r < count; r++) {
                    const float v = total[m][r] + (w.bias ? w.bias[n * LANES + r] : 0.0f);
                    out[r] = add ? out[r] + v : v;
                }
            }
        }
    }
}

// ---- the rest of a layer -----------------------------------------------------------------------------------------
void normalise(float* out, const float* x, int count, const float* weight, const float* bias, float epsilon) {
    float mean = 0, square = 0;
    if (bias) {
#pragma omp simd reduction(+ : mean)
        for (int i = 0; i < count; i++) mean += x[i];
        mean /= count;
    }
#pragma omp simd reduction(+ : square)
    for (int i = 0; i < count; i++) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(square / count + epsilon);
    for (int i = 0; i < count; i++) out[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f);
}

void normalise_rows(const Model& model, const Norm& norm, const float* x, float* out, int rows) {
    for (int m = 0; m < rows; m++) {
        const size_t at = size_t(m) * model.width;
        normalise(out + at, x + at, model.width, norm.weight, norm.bias, model.epsilon);
    }
}

float activated(float x, int kind) {
    if (kind == RELU) return std::max(x, 0.0f);
    if (kind == GELU) return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    const float u = kind == SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
    return x / (1.0f + std::exp(-u));
}

// out (rows, width) = act(gate) * up, or act(up), of inner (rows, 2 width or width).
void activate(const Model& model, const float* inner, float* out, int rows, int width) {
    const int stride = model.gated ? 2 * width : width;
    for (int m = 0; m < rows; m++) {
        const float *gate = inner + size_t(m) * stride, *up = gate + width;
        float* y = out + size_t(m) * width;
        int i = 0;
        if (model.activation == SILU || model.activation == GELU_TANH)
            for (; i + LANES <= width; i += LANES) {
                const vf x = load(gate + i);
                const vf u = model.activation == SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
                const vf made = x / (1.0f + vexp(-u));
                store(y + i, model.gated ? made * load(up + i) : made);
            }
        for (; i < width; i++) y[i] = activated(gate[i], model.activation) * (model.gated ? up[i] : 1.0f);
    }
}

inline float read(const float* p) { return *p; }
inline float read(const uint16_t* p) { return from_bf16(*p); }
inline void write(float* p, float v) { *p = v; }
inline void write(uint16_t* p, float v) { *p = to_bf16(v); }

struct Scratch {
    Activations a;
    std::vector<float> normed, qkv, attended, inner, gated, made, angles, one;
};

// Rotates queries and keys in place and keeps keys and values. One call per token.
template <typename T> void rotate_and_keep(const Model& model, const Layer& layer, const Step& step, int t, float* qkv, float* angles) {
    const int size = model.head_size, queries = model.heads, keys = model.kv_heads, position = step.positions[t];
    for (int h = 0; h < queries + keys; h++) {
        const float* weight = h < queries ? layer.q_norm : layer.k_norm;
        if (weight) normalise(qkv + h * size, qkv + h * size, size, weight, nullptr, model.epsilon);
    }
    if (layer.rope >= 0) {
        const Rope& rope = model.ropes[layer.rope];
        const int half = rope.half;
        for (int i = 0; i < half; i++) {
            const float angle = float(position) * rope.frequencies[i];
            angles[i] = std::cos(angle) * rope.scale;
            angles[half + i] = std::sin(angle) * rope.scale;
        }
        for (int h = 0; h < queries + keys; h++) {
            float *first = qkv + h * size, *second = first + half;
            for (int i = 0; i < half; i++) {
                const float a = first[i], b = second[i], c = angles[i], s = angles[half + i];
                first[i] = a * c - b * s;
                second[i] = b * c + a * s;
            }
        }
    }
    const int block = step.tables[step.table_of_token[t] + position / BLOCK], place = position % BLOCK;
    for (int h = 0; h < keys; h++) {
        const size_t at = ((size_t(block) * keys + h) * BLOCK + place) * size;
        const float *k = qkv + (queries + h) * size, *v = qkv + (queries + keys + h) * size;
        for (int i = 0; i < size; i++) write((T*)layer.keys + at + i, k[i]), write((T*)layer.values + at + i, v[i]);
    }
}

inline vf read16(const float* p) { return load(p); }
inline vf read16(const uint16_t* p) {
    typedef uint16_t v16 __attribute__((vector_size(32), aligned(2)));
    v16 half; std::memcpy(&half, p, sizeof half);
    const vu bits = __builtin_convertvector(half, vu) << 16;
    vf made; std::memcpy(&made, &bits, sizeof made);
    return made;
}
inline float sum_of(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int j = 0; j < LANES; j++) total += v[j];
    return total;
#endif
}

// Scores into chances: the softmax of s[begin, stop), zero elsewhere up to `padded`, a multiple of 16.
void softmax(float* s, int begin, int stop, int padded) {
    float top = -1e30f, total = 0;
#pragma omp simd reduction(max : top)
    for (int i = begin; i < stop; i++) top = std::max(top, s[i]);
    for (int i = begin / LANES * LANES; i < stop; i += LANES) store(s + i, vexp(load(s + i) - top));
    std::memset(s, 0, begin * sizeof(float));
    std::memset(s + stop, 0, (padded - stop) * sizeof(float));
#pragma omp simd reduction(+ : total)
    for (int i = begin; i < stop; i++) total += s[i];
    const float scale = 1.0f / total;
    for (int i = begin; i < stop; i++) s[i] *= scale;
}

// G queries of one token that share one key-value head, over its context. Needs a head size that 16 divides.
template <typename T, int G>
void attend(const Model& model, const Layer& layer, const Step& step, int t, int kv, const float* q, float* out, std::vector<float>& scratch) {
    const int size = model.head_size, position = step.positions[t], low = layer.window ? std::max(0, position - layer.window + 1) : 0;
    const int base = low / BLOCK * BLOCK, blocks = position / BLOCK - low / BLOCK + 1, padded = blocks * BLOCK;
    scratch.resize(size_t(G) * padded);
    float* scores = scratch.data();
    const int32_t* table = step.tables + step.table_of_token[t] + base / BLOCK;
    for (int b = 0; b < blocks; b++) {
        const T* k = (const T*)layer.keys + (size_t(table[b]) * model.kv_heads + kv) * BLOCK * size;
        const int stop = std::min<int>(BLOCK, position + 1 - base - b * BLOCK);
        for (int p = 0; p < stop; p++) {
            vf sums[G] = {};
            for (int i = 0; i < size; i += LANES) {
                const vf row = read16(k + p * size + i);
                for (int g = 0; g < G; g++) sums[g] += row * load(q + g * size + i);
            }
            for (int g = 0; g < G; g++) scores[size_t(g) * padded + b * BLOCK + p] = sum_of(sums[g]) * model.scale;
        }
    }
    for (int g = 0; g < G; g++) {
        float* s = scores + size_t(g) * padded;
        if (model.softcap > 0)
            for (int i = low - base; i <= position - base; i++) s[i] = model.softcap * std::tanh(s[i] / model.softcap);
        softmax(s, low - base, position - base + 1, padded);
    }
    for (int i = 0; i < size; i += LANES) {
        vf sums[G] = {};
        for (int b = 0; b < blocks; b++) {
            const T* v = (const T*)layer.values + (size_t(table[b]) * model.kv_heads + kv) * BLOCK * size + i;
            const int stop = std::min<int>(BLOCK, position + 1 - base - b * BLOCK);
            for (int p = 0; p < stop; p++) {
                const vf row = read16(v + p * size);
                for (int g = 0; g < G; g++) sums[g] += scores[size_t(g) * padded + b * BLOCK + p] * row;
            }
        }
        for (int g = 0; g < G; g++) store(out + g * size + i, sums[g]);
    }
}

template <typename T>
void attend_token(const Model& model, const Layer& layer, const Step& step, int t, int kv, const float* q, float* out, std::vector<float>& scratch) {
    const int shared = model.heads / model.kv_heads, size = model.head_size;
    for (int g = 0; g < shared;) {
        const float* query = q + g * size;
        float* y = out + g * size;
        if (shared - g >= 4) attend<T, 4>(model, layer, step, t, kv, query, y, scratch), g += 4;
        else if (shared - g >= 2) attend<T, 2>(model, layer, step, t, kv, query, y, scratch), g += 2;
        else attend<T, 1>(model, layer, step, t, kv, query, y, scratch), g += 1;
    }
}

// Several consecutive tokens of one sequence: a block of keys is transposed once, so that lanes are positions.
template <typename T>
void attend_run(const Model& model, const Layer& layer, const Step& step, int t, int many, int kv, const float* q, size_t q_stride,
                float* out, size_t out_stride, std::vector<float>& scratch) {
    const int size = model.head_size, shared = model.heads / model.kv_heads, pairs = many * shared;
    const int start = step.positions[t], low = layer.window ? std::max(0, start - layer.window + 1) : 0;
    const int base = low / BLOCK * BLOCK, blocks = (start + many - 1) / BLOCK - low / BLOCK + 1, padded = blocks * BLOCK;
    scratch.resize(size_t(pairs) * padded + size_t(size) * BLOCK);
    float *scores = scratch.data(), *wide = scores + size_t(pairs) * padded;
    const int32_t* table = step.tables + step.table_of_token[t] + base / BLOCK;
    for (int b = 0; b < blocks; b++) {
        const T* k = (const T*)layer.keys + (size_t(table[b]) * model.kv_heads + kv) * BLOCK * size;
        for (int p = 0; p < BLOCK; p++)
            for (int i = 0; i < size; i++) wide[i * BLOCK + p] = read(k + p * size + i);
        for (int pair = 0; pair < pairs; pair++) {
            const float* query = q + (pair / shared) * q_stride + (pair % shared) * size;
            vf first = {}, second = {};
            for (int i = 0; i < size; i++) {
                first += query[i] * load(wide + i * BLOCK);
                second += query[i] * load(wide + i * BLOCK + LANES);
            }
            float* s = scores + size_t(pair) * padded + b * BLOCK;
            store(s, first * model.scale);
            store(s + LANES, second * model.scale);
            if (model.softcap > 0)
                for (int p = 0; p < BLOCK; p++) s[p] = model.softcap * std::tanh(s[p] / model.softcap);
        }
    }
    for (int pair = 0; pair < pairs; pair++) {
        const int position = start + pair / shared, begin = (layer.window ? std::max(0, position - layer.window + 1) : 0) - base;
        softmax(scores + size_t(pair) * padded, std::max(0, begin), position - base + 1, padded);
        std::memset(out + (pair / shared) * out_stride + (pair % shared) * size, 0, size * sizeof(float));
    }
    for (int b = 0; b < blocks; b++) {
        const T* v = (const T*)layer.values + (size_t(table[b]) * model.kv_heads + kv) * BLOCK * size;
        for (int i = 0; i < BLOCK * size; i++) wide[i] = read(v + i);
        for (int pair = 0; pair < pairs; pair++) {
            const float* s = scores + size_t(pair) * padded + b * BLOCK;
            float* y = out + (pair / shared) * out_stride + (pair % shared) * size;
            int i = 0;
            for (; i + LANES <= size; i += LANES) {
                vf sum = load(y + i);
                for (int p = 0; p < BLOCK; p++) sum += s[p] * load(wide + p * size + i);
                store(y + i, sum);
            }
            for (; i < size; i++)
                for (int p = 0; p < BLOCK; p++) y[i] += s[p] * wide[p * size + i];
        }
    }
}

// Tokens [first, second) of one sequence, at consecutive positions, few enough that their scores stay in the cache.
std::vector<std::pair<int, int>> runs_of(const Step& step) {
    std::vector<std::pair<int, int>> made;
    for (int t = 0; t < step.tokens; t++) {
        const bool follows = t > 0 && step.table_of_token[t] == step.table_of_token[t - 1] &&
                             step.positions[t] == step.positions[t - 1] + 1 && t - made.back().first < RUN;
        if (follows) made.back().second = t + 1;
        else made.emplace_back(t, t + 1);
    }
    return made;
}

template <typename T> void attention(const Model& model, const Layer& layer, const Step& step, Scratch& s) {
    const int size = model.head_size, shared = model.heads / model.kv_heads;
    const size_t stride = size_t(model.heads + 2 * model.kv_heads) * size, queries = size_t(model.heads) * size;
    s.angles.resize(2 * size);
    for (int t = 0; t < step.tokens; t++) rotate_and_keep<T>(model, layer, step, t, &s.qkv[t * stride], s.angles.data());
    const auto runs = runs_of(step);
    const int jobs = int(runs.size()) * model.kv_heads;
#pragma omp parallel for num_threads(model.threads) if (model.threads > 1) schedule(dynamic)
    for (int job = 0; job < jobs; job++) {
        thread_local std::vector<float> scratch;
        const int kv = job % model.kv_heads, begin = runs[job / model.kv_heads].first, end = runs[job / model.kv_heads].second;
        const size_t at = size_t(kv) * shared * size;
        float *q = &s.qkv[begin * stride + at], *out = &s.attended[begin * queries + at];
        // By the number of tokens alone: one token is then computed with the same bits alone and in a window of drafts.
        if (end - begin == RUN || size % LANES)
            attend_run<T>(model, layer, step, begin, end - begin, kv, q, stride, out, queries, scratch);
        else
            for (int t = begin; t < end; t++)
                attend_token<T>(model, layer, step, t, kv, q + (t - begin) * stride, out + (t - begin) * queries, scratch);
    }
}

void dense(const Model& model, const Matrix& gate_up, const Matrix& down, const float* x, float* out, int rows, Scratch& s) {
    const int width = gate_up.outputs / (model.gated ? 2 : 1);
    s.inner.resize(size_t(rows) * gate_up.outputs);
    s.gated.resize(size_t(rows) * width);
    prepare(s.a, x, rows, gate_up.inputs, gate_up.bits);
    multiply(gate_up, s.a, rows, s.inner.data(), false, model.threads);
    activate(model, s.inner.data(), s.gated.data(), rows, width);
    prepare(s.a, s.gated.data(), rows, down.inputs, down.bits);
    multiply(down, s.a, rows, out, false, model.threads);
}

float product(const float* a, const float* b, int count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

void experts(const Model& model, const Layer& layer, const float* x, float* out, int rows, Scratch& s) {
    const int width = model.width;
    std::vector<float> chance(model.experts);
    std::vector<int> order(model.experts);
    s.one.resize(width);
    for (int m = 0; m < rows; m++) {
        const float* row = x + size_t(m) * width;
        float *y = out + size_t(m) * width, top = -1e30f, total = 0, chosen = 0;
        for (int e = 0; e < model.experts; e++) {
            chance[e] = product(layer.router + size_t(e) * width, row, width);
            top = std::max(top, chance[e]);
            order[e] = e;
        }
        for (float& c : chance) total += c = std::exp(c - top);
        std::partial_sort(order.begin(), order.begin() + model.experts_per_token, order.end(),
                          [&](int a, int b) { return chance[a] > chance[b] || (chance[a] == chance[b] && a < b); });
        for (int i = 0; i < model.experts_per_token; i++) chosen += chance[order[i]];
        std::memset(y, 0, width * sizeof(float));
        for (int i = 0; i < model.experts_per_token; i++) {
            const int e = order[i];
            const float weight = chance[e] / (model.normalise ? chosen : total);
            dense(model, layer.expert_gate_up[e], layer.expert_down[e], row, s.one.data(), 1, s);
            for (int k = 0; k < width; k++) y[k] += weight * s.one[k];
        }
        if (layer.shared_router) {
            const float weight = 1.0f / (1.0f + std::exp(-product(layer.shared_router, row, width)));
            dense(model, layer.shared_gate_up, layer.shared_down, row, s.one.data(), 1, s);
            for (int k = 0; k < width; k++) y[k] += weight * s.one[k];
        }
    }
}

void add(float* x, const float* y, size_t count) { for (size_t i = 0; i < count; i++) x[i] += y[i]; }

void run_layer(const Model& model, const Layer& layer, const Step& step, float* x, Scratch& s) {
    const int rows = step.tokens;
    const size_t all_x = size_t(rows) * model.width;
    s.normed.resize(all_x), s.made.resize(all_x);
    s.qkv.resize(size_t(rows) * layer.qkv.outputs);
    s.attended.resize(size_t(rows) * layer.output.inputs);
    normalise_rows(model, layer.attention_norm, x, s.normed.data(), rows);
    prepare(s.a, s.normed.data(), rows, model.width, layer.qkv.bits);
    multiply(layer.qkv, s.a, rows, s.qkv.data(), false, model.threads);
    model.bf16_cache ? attention<uint16_t>(model, layer, step, s) : attention<float>(model, layer, step, s);
    prepare(s.a, s.attended.data(), rows, layer.output.inputs, layer.output.bits);
    multiply(layer.output, s.a, rows, s.made.data(), false, model.threads);
    if (model.post_norms) normalise_rows(model, layer.attention_post_norm, s.made.data(), s.made.data(), rows);
    add(x, s.made.data(), all_x);
    if (!model.parallel) normalise_rows(model, layer.ffn_norm, x, s.normed.data(), rows);
    if (layer.sparse) experts(model, layer, s.normed.data(), s.made.data(), rows, s);
    else dense(model, layer.gate_up, layer.down, s.normed.data(), s.made.data(), rows, s);
    if (model.post_norms) normalise_rows(model, layer.ffn_post_norm, s.made.data(), s.made.data(), rows);
    add(x, s.made.data(), all_x);
}
}  // namespace

extern "C" {
// Hidden states x (tokens, width), float32, through `count` layers, in place.
void ecotone_layers(const Model* model, const Layer* layers, int32_t count, const Step* step, float* x) {
    thread_local Scratch scratch;
    for (int i = 0; i < count; i++) run_layer(*model, layers[i], *step, x, scratch);
}

// logits (rows, outputs) of hidden states x (rows, width): final norm, head, soft cap (0: none).
void ecotone_head(const Model* model, const Norm* norm, const Matrix* head, int32_t rows, const float* x, float softcap, float* logits) {
    thread_local Scratch scratch;
    scratch.normed.resize(size_t(rows) * model->width);
    normalise_rows(*model, *norm, x, scratch.normed.data(), rows);
    prepare(scratch.a, scratch.normed.data(), rows, model->width, head->bits);
    multiply(*head, scratch.a, rows, logits, false, model->threads);
    if (softcap > 0)
        for (size_t i = 0; i < size_t(rows) * head->outputs; i++) logits[i] = softcap * std::tanh(logits[i] / softcap);
}

// Rows `ids` of a table packed like a matrix, times `scale`: x (rows, inputs).
void ecotone_embed(const Matrix* table, const int64_t* ids, int32_t rows, float scale, float* x) {
    const int inputs = table->inputs, groups = (inputs + GROUP - 1) / GROUP, bits = table->bits;
    const size_t bytes_of_group = group_bytes(bits);
    for (int m = 0; m < rows; m++) {
        const int lane = int(ids[m] % LANES);
        const uint8_t* data = table->data + size_t(ids[m] / LANES) * groups * bytes_of_group;
        for (int k = 0; k < inputs; k++) {
            const uint8_t* group = data + size_t(k / GROUP) * bytes_of_group;
            const int i = k % GROUP;
            float value;
            if (bits == 32) {
                std::memcpy(&value, group + i * 64 + lane * 4, 4);
            } else if (bits == 16) {
                uint16_t b; std::memcpy(&b, group + (i / 2) * 64 + lane * 4 + (i % 2) * 2, 2);
                value = from_bf16(b);
            } else {
                const int vector = bits == 4 ? (i % 16) / 4 : i / 4;
                const uint8_t byte = group[vector * 64 + lane * 4 + i % 4];
                value = bits == 8 ? float(byte) - 128 : float(i < 16 ? byte & 15 : byte >> 4) - 8;
                value *= half_scales(group + (bits == 4 ? 256 : 512))[lane];
            }
            x[size_t(m) * inputs + k] = value * scale;
        }
    }
}

// The `number` most likely tokens, each given those before it, of a whole model: `tokens` follow `token`, which is at position
// `start` of the sequence with blocks `table`. Of ids below `limit` only. `places`: learned positions, or null.
void ecotone_greedy(const Model* model, const Layer* layers, int32_t count, const Matrix* embedding, float scale,
                    const float* places, const Norm* norm, const Matrix* head, const int32_t* table, int32_t start,
                    int32_t token, int32_t limit, int32_t number, int32_t* tokens) {
    thread_local std::vector<float> x, logits;
    x.resize(model->width), logits.resize(head->outputs);
    const int32_t first = 0;
    for (int32_t i = 0; i < number; i++) {
        const int64_t id = token;
        const int32_t position = start + i;
        ecotone_embed(embedding, &id, 1, scale, x.data());
        if (places) add(x.data(), places + size_t(position) * model->width, model->width);
        const Step step{1, &position, &first, table};
        ecotone_layers(model, layers, count, &step, x.data());
        ecotone_head(model, norm, head, 1, x.data(), 0, logits.data());  // a soft cap does not change the order
        tokens[i] = token = int32_t(std::max_element(logits.begin(), logits.begin() + limit) - logits.begin());
    }
}

// One product, for tests and for measuring.
void ecotone_multiply(const Matrix* w, const float* x, int32_t rows, float* y, int32_t threads) {
    thread_local Activations a;
    prepare(a, x, rows, w->inputs, w->bits);
    multiply(*w, a, rows, y, false, threads);
}
}
