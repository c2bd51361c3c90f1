// Eight floats at a time: AVX2, FMA and F16C. The names are those of simd_scalar.h, which says what each does;
// + - * / are the compiler's.

using Floats = __m256;
using Mask = __m256;
constexpr int LANES = 8;

static inline Floats all(float x) { return _mm256_set1_ps(x); }
static inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
static inline Floats load(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline Floats load(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
static inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
static inline void store(BFloat16* to, Floats x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i upper = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i unknown = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    upper = _mm256_blendv_epi8(upper, _mm256_set1_epi32(0x7FC0), unknown);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
static inline void store(Float16* to, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
static inline Floats size_of(Floats a) { return _mm256_andnot_ps(all(-0.0f), a); }
static inline Mask at_most(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
static inline bool everywhere(Mask mask) { return _mm256_movemask_ps(mask) == 0xFF; }
static inline Floats select(Mask mask, Floats a, Floats b) { return _mm256_blendv_ps(b, a, mask); }
static inline Floats rounded(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Floats times_power_of_two(Floats x, Floats n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return x * _mm256_castsi256_ps(first) * _mm256_castsi256_ps(second);
}
static inline float sum_of(Floats a) {
    __m128 four = _mm256_castps256_ps128(a) + _mm256_extractf128_ps(a, 1);
    four = four + _mm_movehl_ps(four, four);
    return four[0] + four[1];
}
static inline float largest_of(Floats a) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
