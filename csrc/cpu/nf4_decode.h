// Decoding one NF4 block, in three variants that give the same bits: scalar, AVX2, AVX-512.
#pragma once

#include "common/nf4_levels.h"
#include "cpu/features.h"
#include "cpu/numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastpeft::cpu {

// out[i] = level(code i) * scale for `length` elements; codes start at a whole byte.
template <typename T>
using DecodeBlock = void (*)(const uint8_t* codes, float scale, int64_t length, T* out);

template <typename T>
void decode_scalar(const uint8_t* codes, float scale, int64_t length, T* out) {
  for (int64_t i = 0; i < length; ++i) {
    const int code = i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
    out[i] = from_float<T>(kNF4Levels[code] * scale);
  }
}

#if defined(__x86_64__)
#define FASTPEFT_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FASTPEFT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")))

// Eight bytes to sixteen codes, a byte each, in element order.
FASTPEFT_AVX2 inline __m128i unpack_codes(const uint8_t* codes) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m128i nibble = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), _mm_and_si128(bytes, nibble));
}

// --- stores of 16 floats; products of a level and a scale are never NaN unless the scale is
// ---------------------------
FASTPEFT_AVX512 inline void store16(float* out, __m512 x) { _mm512_storeu_ps(out, x); }
FASTPEFT_AVX512 inline void store16(double* out, __m512 x) {
  _mm512_storeu_pd(out, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
  _mm512_storeu_pd(out + 8, _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(x), 1))));
}
FASTPEFT_AVX512 inline void store16(Float16* out, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FASTPEFT_AVX512 inline void store16(BFloat16* out, __m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  rounded = _mm512_mask_blend_epi32(nan, rounded, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(rounded));
}

FASTPEFT_AVX2 inline void store8(float* out, __m256 x) { _mm256_storeu_ps(out, x); }
FASTPEFT_AVX2 inline void store8(double* out, __m256 x) {
  _mm256_storeu_pd(out, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
  _mm256_storeu_pd(out + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}
FASTPEFT_AVX2 inline void store8(Float16* out, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FASTPEFT_AVX2 inline void store8(BFloat16* out, __m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  rounded = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}

template <typename T>
FASTPEFT_AVX512 void decode_avx512(const uint8_t* codes, float scale, int64_t length, T* out) {
  const __m512 levels = _mm512_loadu_ps(kNF4Levels);
  const __m512 scales = _mm512_set1_ps(scale);
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) {
    const __m512i index = _mm512_cvtepu8_epi32(unpack_codes(codes + i / 2));
    store16(out + i, _mm512_mul_ps(_mm512_permutexvar_ps(index, levels), scales));
  }
  if (i < length) decode_scalar(codes + i / 2, scale, length - i, out + i);
}

template <typename T>
FASTPEFT_AVX2 void decode_avx2(const uint8_t* codes, float scale, int64_t length, T* out) {
  const __m256 low = _mm256_loadu_ps(kNF4Levels), high = _mm256_loadu_ps(kNF4Levels + 8);
  const __m256 scales = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) {
    __m128i unpacked = unpack_codes(codes + i / 2);
    for (int half = 0; half < 2; ++half, unpacked = _mm_srli_si128(unpacked, 8)) {
      const __m256i index = _mm256_cvtepu8_epi32(unpacked);
      const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 to the sign
      const __m256 level =
          _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), is_high);
      store8(out + i + 8 * half, _mm256_mul_ps(level, scales));
    }
  }
  if (i < length) decode_scalar(codes + i / 2, scale, length - i, out + i);
}
#endif  // __x86_64__

template <typename T>
DecodeBlock<T> choose_decode([[maybe_unused]] const Features& features) {
#if defined(__x86_64__)
  if (features.avx512) return decode_avx512<T>;
  if (features.avx2) return decode_avx2<T>;
#endif
  return decode_scalar<T>;
}

}  // namespace fastpeft::cpu
