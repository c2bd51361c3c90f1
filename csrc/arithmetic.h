// Functions of vectors of floats, to about one unit in the last place. Included by each instruction set into its own
// namespace, after its simd_*.h. Everything lets NaN through.

static inline Floats zero() { return all(0.0f); }

static inline bool is_nan(float x) { return x != x; }

// The polynomial of these coefficients, the highest power's first
template <class... Coefficients>
static inline Floats polynomial(Floats x, float highest, Coefficients... others) {
    Floats value = all(highest);
    ((value = multiply_add(value, x, all(others))), ...);
    return value;
}

// e^x = 2^n (1 + less_one), |less_one| <= 0.42
struct Exponential {
    Floats n, less_one;
};

static inline Exponential exponential_of(Floats x) {
    const Floats n = rounded(x * all(1.44269504088896341f));
    // ln 2 in two parts, the first with few bits: n times it is exact
    Floats r = multiply_add(n, all(-0.693359375f), x);
    r = multiply_add(n, all(2.12194440e-4f), r);
    const Floats p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                1.6666665459e-1f, 5.0000001201e-1f);  // Cephes' expf
    return {n, multiply_add(p, r * r, r)};
}

// e^x for x <= 88; 0 below -104. No logit lies more than LAZY above what is subtracted from it.
static inline Floats exp_of(Floats x) {
    const auto [n, less_one] = exponential_of(larger(all(-104.0f), x));
    return times_power_of_two(less_one + all(1.0f), n);
}

constexpr float NEAR = 0.5f;  // where expm1_excess holds

// (e^x - 1) - x >= 0 for |x| <= 1/2, with full relative precision near 0: x^2/2 + x^3/6 + ...
static inline Floats expm1_excess(Floats x) {
    const Floats p = polynomial(x, 1.0f / 3628800.0f, 1.0f / 362880.0f, 1.0f / 40320.0f, 1.0f / 5040.0f, 1.0f / 720.0f,
                                1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f);
    return p * (x * x);
}

static inline Floats clamp_near(Floats x) { return smaller(all(NEAR), larger(all(-NEAR), x)); }

// e^x - 1
static inline Floats expm1_of(Floats x) {
    const Floats near = clamp_near(x);
    return select(at_most(size_of(x), all(NEAR)), near + expm1_excess(near), exp_of(x) - all(1.0f));
}

// log(1 + x) for -1/2 <= x <= 0, as 2 artanh(x / (2 + x)): nothing is lost near 0
static inline Floats log1p_of(Floats x) {
    const Floats s = x / (x + all(2.0f));
    const Floats square = s * s;
    const Floats p = polynomial(square, 2.0f / 17.0f, 2.0f / 15.0f, 2.0f / 13.0f, 2.0f / 11.0f, 2.0f / 9.0f,
                                2.0f / 7.0f, 2.0f / 5.0f, 2.0f / 3.0f);
    return multiply_add(p * square, s, s + s);
}

// To 0.8 units in the last place, because a softcap multiplies the error of a tanh by the size of the logits. Cephes'
// tanhf near 0; elsewhere 1 - 2 / (e^2x + 1), with what the sum, the quotient and the difference round away added back.
static inline Floats tanh_of(Floats x) {
    const Floats square = x * x;
    const Floats p = polynomial(square, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                                -3.33332819422e-1f);
    const Floats near = multiply_add(p * square, x, x);
    const auto [n, less_one] = exponential_of(smaller(all(20.0f), size_of(x) + size_of(x)));
    const Floats power = times_power_of_two(all(1.0f), n), whole = power + all(1.0f), part = power * less_one;
    const Floats sum = whole + part, sum_rest = (whole - sum) + part;
    const Floats quotient = all(2.0f) / sum;
    const Floats rest = multiply_add(zero() - quotient, sum, all(2.0f)) - quotient * sum_rest;
    const Floats difference = all(1.0f) - quotient;
    const Floats size = difference + (((all(1.0f) - difference) - quotient) - rest / sum);
    const Floats far = select(at_most(x, zero()), zero() - size, size);
    return select(at_most(size_of(x), all(0.625f)), near, far);
}

// d z / d (z before the cap) = 1 - (z / cap)^2, as a product that loses nothing near the cap; 1 where there is no cap
static inline Floats softcap_slope(Floats logits, float softcap) {
    const Floats ratio = logits / all(softcap);
    return (all(1.0f) - ratio) * (all(1.0f) + ratio);
}
static inline float softcap_slope(float logit, float softcap) {
    if (softcap <= 0.0f) return 1.0f;
    const float ratio = logit / softcap;
    return (1.0f - ratio) * (1.0f + ratio);
}

// 0 where the probability is 0, whatever the factor: infinite, or NaN as the difference of two logits of -infinity
static inline Floats times(Floats probability, Floats factor) {
    return select(at_most(probability, zero()), zero(), probability * factor);
}

// from * (expm1(gap) - gap) >= 0, gap = log to - log from: what KL(from||to) sums
static inline Floats relative_entropy(Floats from, Floats to, Floats gap) {
    const Floats near = from * expm1_excess(clamp_near(gap));
    const Floats far = larger(zero(), (to - from) - times(from, gap));
    return select(at_most(size_of(gap), all(NEAR)), near, far);
}
