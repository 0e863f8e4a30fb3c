// Vectors of floats and the element types, for AVX512 (TOPK_AVX512), AVX2 (TOPK_AVX2), or any processor.
//
// The portable vectors are those of GCC and Clang, which the compiler lays out for the processor at hand.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(TOPK_AVX512) || defined(TOPK_AVX2)
#include <immintrin.h>
#endif

namespace topk {

constexpr float INF = std::numeric_limits<float>::infinity();

template <typename To, typename From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &x, sizeof(To));
  return result;
}

// --- Element types

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline float to_float(float x) {
  return x;
}

inline float to_float(BFloat16 x) {
  return bit_cast<float>(uint32_t(x.bits) << 16);
}

inline float to_float(Half x) {
#if defined(TOPK_AVX512) || defined(TOPK_AVX2)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude << 13));
  // Scaling by 2^112 moves the exponent's bias, and makes subnormal halves normal floats.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(uint32_t(0x77800000));
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | sign);
#endif
}

inline void from_float(float x, float& result) {
  result = x;
}

inline void from_float(float x, BFloat16& result) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  result.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void from_float(float x, Half& result) {
#if defined(TOPK_AVX512) || defined(TOPK_AVX2)
  result.bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    result.bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // 65520 and more round to infinity
    result.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: an addition rounds at the last bit of a half
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    result.bits = uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000));
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    result.bits = uint16_t(sign | ((rounded - 0x38000000) >> 13));
  }
#endif
}

// --- Vectors

#if defined(TOPK_AVX512)

constexpr int LANES = 16;
constexpr int GROUP_ROWS = 12;  // with two vectors of keys: 24 of 32 registers hold sums
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* x) { return _mm512_loadu_ps(x); }
inline Vec load(const BFloat16* x) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load(const Half* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
inline void store(float* x, Vec v) { _mm512_storeu_ps(x, v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }

// A bit for each lane in which a <= b does not hold: also where one is NaN.
inline uint32_t not_less_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }

// Lane n of the result is the sum of vector n.
inline Vec sums(const Vec (&v)[LANES]) {
  Vec pairs[8], quads[4], halves[2];
  for (int n = 0; n < 8; n++)
    pairs[n] = add(_mm512_unpacklo_ps(v[2 * n], v[2 * n + 1]), _mm512_unpackhi_ps(v[2 * n], v[2 * n + 1]));
  for (int n = 0; n < 4; n++) {
    const __m512d a = _mm512_castps_pd(pairs[2 * n]), b = _mm512_castps_pd(pairs[2 * n + 1]);
    quads[n] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int n = 0; n < 2; n++) {
    const Vec a = quads[2 * n], b = quads[2 * n + 1];
    halves[n] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return add(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88), _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

#elif defined(TOPK_AVX2)

constexpr int LANES = 8;
constexpr int GROUP_ROWS = 6;  // with two vectors of keys: 12 of 16 registers hold sums
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* x) { return _mm256_loadu_ps(x); }
inline Vec load(const BFloat16* x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load(const Half* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
inline void store(float* x, Vec v) { _mm256_storeu_ps(x, v); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline uint32_t not_less_equal(Vec a, Vec b) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ))); }
inline float sum(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline Vec sums(const Vec (&v)[LANES]) {
  Vec quads[2];
  for (int n = 0; n < 2; n++) {
    const Vec* a = v + 4 * n;
    quads[n] = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  }
  return add(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}

#else

constexpr int LANES = 4;
constexpr int GROUP_ROWS = 4;
typedef float Vec __attribute__((vector_size(16)));

inline Vec zero() { return Vec{}; }
inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
template <typename T>
inline Vec load(const T* x) { return Vec{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])}; }
inline void store(float* x, Vec v) { std::memcpy(x, &v, sizeof(v)); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline uint32_t not_less_equal(Vec a, Vec b) {
  uint32_t bits = 0;
  for (int n = 0; n < LANES; n++) bits |= uint32_t(!(a[n] <= b[n])) << n;
  return bits;
}
inline Vec sums(const Vec (&v)[LANES]) { return Vec{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])}; }

#endif

// Integers beside the lanes of a Vec, as GCC and Clang lay them out.
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline Ints load(const int32_t* x) {
  Ints v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}
inline void store(int32_t* x, Ints v) { std::memcpy(x, &v, sizeof(v)); }
inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

inline int32_t smallest(Ints v) {
#if defined(TOPK_AVX512)
  return _mm512_reduce_min_epi32((__m512i)v);
#else
  int32_t found = v[0];
  for (int lane = 1; lane < LANES; lane++) found = v[lane] < found ? v[lane] : found;
  return found;
#endif
}

inline int32_t largest(Ints v) {
  return ~smallest(~v);
}

inline void prefetch(const void* x) {
  // GCC drops calls of functions that do nothing but prefetch, unless something in them is volatile.
  asm volatile("");
  __builtin_prefetch(x);
}

// e^x for x <= 0, without a branch so that loops of it vectorise. Below the smallest normal number it is 0.
inline float exp_nonpositive(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // the integer nearest to x / ln 2, in the lowest bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < -87.0f ? 0.0f : p * power;
}

}  // namespace topk
