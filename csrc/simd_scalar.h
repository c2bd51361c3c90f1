// Eight floats at a time in plain C++: for machines without AVX2, for ARM and for MSVC. The loops are of fixed length,
// so that a compiler turns them into whatever vectors its baseline has (SSE2, NEON).

constexpr int LANES = 8;
struct Floats {
    float v[8];
};
struct Mask {
    bool v[8];
};

#define FASTFORGET_EACH(result, expression) \
    result r;                               \
    for (int i = 0; i < 8; ++i) {           \
        r.v[i] = expression;                \
    }                                       \
    return r

static inline Floats all(float x) { FASTFORGET_EACH(Floats, x); }
template <class In>
static inline Floats load(const In* from) {
    FASTFORGET_EACH(Floats, widened(from[i]));
}
template <class Out>
static inline void store(Out* to, Floats x) {
    for (int i = 0; i < 8; ++i) narrow(x.v[i], to[i]);
}
static inline Floats operator+(Floats a, Floats b) { FASTFORGET_EACH(Floats, a.v[i] + b.v[i]); }
static inline Floats operator-(Floats a, Floats b) { FASTFORGET_EACH(Floats, a.v[i] - b.v[i]); }
static inline Floats operator*(Floats a, Floats b) { FASTFORGET_EACH(Floats, a.v[i] * b.v[i]); }
static inline Floats operator/(Floats a, Floats b) { FASTFORGET_EACH(Floats, a.v[i] / b.v[i]); }
// a * b + c, rounded once or twice, as the machine has it
static inline Floats multiply_add(Floats a, Floats b, Floats c) { FASTFORGET_EACH(Floats, a.v[i] * b.v[i] + c.v[i]); }
// the larger (smaller) of the two; the second where either is NaN
static inline Floats larger(Floats a, Floats b) { FASTFORGET_EACH(Floats, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline Floats smaller(Floats a, Floats b) { FASTFORGET_EACH(Floats, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline Floats size_of(Floats a) { FASTFORGET_EACH(Floats, a.v[i] < 0.0f ? -a.v[i] : a.v[i]); }
static inline Mask at_most(Floats a, Floats b) { FASTFORGET_EACH(Mask, a.v[i] <= b.v[i]); }
static inline bool everywhere(Mask mask) {
    bool all_set = true;
    for (int i = 0; i < 8; ++i) all_set = all_set && mask.v[i];
    return all_set;
}
static inline Floats select(Mask mask, Floats a, Floats b) { FASTFORGET_EACH(Floats, mask.v[i] ? a.v[i] : b.v[i]); }
// to the nearest integer, for |x| < 2^22
static inline Floats rounded(Floats a) { FASTFORGET_EACH(Floats, (a.v[i] + 12582912.0f) - 12582912.0f); }
// x * 2^n, n an integer of -252..254: in two halves, so that the result may be subnormal
static inline Floats times_power_of_two(Floats x, Floats n) {
    Floats r;
    for (int i = 0; i < 8; ++i) {
        // the integer stands in the last bits of n + 1.5 * 2^23; no conversion, as n may be NaN
        const std::uint32_t whole = bits_of_float(n.v[i] + 12582912.0f) - 0x4B400000u;
        const std::uint32_t half = static_cast<std::uint32_t>(static_cast<std::int32_t>(whole) >> 1);
        r.v[i] = x.v[i] * float_of_bits((half + 127u) << 23) * float_of_bits((whole - half + 127u) << 23);
    }
    return r;
}
static inline float sum_of(Floats a) {
    return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
}
static inline float largest_of(Floats a) {
    float found = a.v[0];
    for (int i = 1; i < 8; ++i) found = a.v[i] > found ? a.v[i] : found;
    return found;
}
#undef FASTFORGET_EACH
