// bfloat16 and float16 in plain C++, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastforget {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

inline float float_of_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline std::uint32_t bits_of_float(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float widened(float x) { return x; }
inline float widened(BFloat16 x) { return float_of_bits(static_cast<std::uint32_t>(x.bits) << 16); }
inline float widened(Float16 x) {
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
    const std::uint32_t rest = static_cast<std::uint32_t>(x.bits & 0x7FFFu) << 13;
    // as a float of the same exponent field, 112 too low: exact also for subnormals, which the factor makes normal
    const float size = float_of_bits(rest) * float_of_bits(0x77800000u);
    const bool special = rest >= (0x7C00u << 13);
    return float_of_bits((special ? rest | 0x7F800000u : bits_of_float(size)) | sign);
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, BFloat16& to) {
    const std::uint32_t bits = bits_of_float(x);
    to.bits = x != x ? 0x7FC0u : static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float x, Float16& to) {
    const std::uint32_t sign = (bits_of_float(x) >> 16) & 0x8000u;
    const std::uint32_t size = bits_of_float(x) & 0x7FFFFFFFu;
    std::uint32_t half;
    if (size > 0x7F800000u) {
        half = 0x7E00u;
    } else if (size >= 0x477FF000u) {  // 65520 and more round to infinity
        half = 0x7C00u;
    } else if (size < 0x38800000u) {  // below 2^-14: adding 2^-1 * 1.0 puts the subnormal's bits last, and rounds
        half = bits_of_float(float_of_bits(size) + 0.5f) - 0x3F000000u;
    } else {
        half = (size + 0xFFFu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
    }
    to.bits = static_cast<std::uint16_t>(half | sign);
}

}  // namespace fastforget
