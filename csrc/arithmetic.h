// Functions of vectors of floats, to about one unit in the last place, and blocks of logits. Included by each instruction
// set into its own namespace, after its simd_*.h. Everything lets NaN through.

static inline Floats zero() { return all(0.0f); }

// a + x * b, for polynomials
static inline Floats horner(Floats b, Floats x, float a) { return multiply_add(b, x, all(a)); }

// e^x for x <= 88; 0 below -104. No logit lies more than LAZY above what is subtracted from it, but for a label's own:
// its lane, which then holds anything, is overwritten before it is looked at.
static inline Floats exp_of(Floats x) {
    x = larger(all(-104.0f), x);
    const Floats n = rounded(x * all(1.44269504088896341f));
    // ln 2 in two parts, the first with few bits: n times it is exact
    Floats r = multiply_add(n, all(-0.693359375f), x);
    r = multiply_add(n, all(2.12194440e-4f), r);
    Floats p = horner(all(1.9875691500e-4f), r, 1.3981999507e-3f);  // Cephes' expf
    p = horner(p, r, 8.3334519073e-3f);
    p = horner(p, r, 4.1665795894e-2f);
    p = horner(p, r, 1.6666665459e-1f);
    p = horner(p, r, 5.0000001201e-1f);
    p = multiply_add(p, r * r, r) + all(1.0f);
    return times_power_of_two(p, n);
}

constexpr float NEAR = 0.5f;  // where expm1_excess holds

// (e^x - 1) - x >= 0 for |x| <= 1/2, with full relative precision near 0: x^2/2 + x^3/6 + ...
static inline Floats expm1_excess(Floats x) {
    Floats p = horner(all(1.0f / 3628800.0f), x, 1.0f / 362880.0f);
    p = horner(p, x, 1.0f / 40320.0f);
    p = horner(p, x, 1.0f / 5040.0f);
    p = horner(p, x, 1.0f / 720.0f);
    p = horner(p, x, 1.0f / 120.0f);
    p = horner(p, x, 1.0f / 24.0f);
    p = horner(p, x, 1.0f / 6.0f);
    p = horner(p, x, 0.5f);
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
    Floats p = horner(all(2.0f / 17.0f), square, 2.0f / 15.0f);
    p = horner(p, square, 2.0f / 13.0f);
    p = horner(p, square, 2.0f / 11.0f);
    p = horner(p, square, 2.0f / 9.0f);
    p = horner(p, square, 2.0f / 7.0f);
    p = horner(p, square, 2.0f / 5.0f);
    p = horner(p, square, 2.0f / 3.0f);
    return multiply_add(p * square, s, s + s);
}

static inline Floats tanh_of(Floats x) {
    const Floats less_one = expm1_of(size_of(x) * all(-2.0f));  // in [-1, 0]
    const Floats size = (zero() - less_one) / (less_one + all(2.0f));
    return select(at_most(x, zero()), zero() - size, size);
}

// Rows are worked on in blocks of BLOCK floats, copied into a buffer: conversion, scale, bias, softcap and the rest of a
// row that fills no vector are dealt with there once, and what follows has whole vectors of plain logits.
struct alignas(64) Block {
    float at[BLOCK];
};

static inline int whole_vectors(int count) { return (count + Floats::lanes - 1) / Floats::lanes * Floats::lanes; }

static inline int length_of_block(std::int64_t start, std::int64_t end) {
    return end - start < BLOCK ? static_cast<int>(end - start) : BLOCK;
}

// Fill the last vector of a block
static inline void pad(Block& block, int count, float value) {
    for (unsigned i = static_cast<unsigned>(count); i % Floats::lanes != 0; ++i) block.at[i] = value;
}

template <class In>
static inline void read_block(const In* from, int count, float scale, Block& block) {
    const int whole = count / Floats::lanes * Floats::lanes;
    for (int i = 0; i < whole; i += Floats::lanes) store(block.at + i, load(from + i) * all(scale));
    if (whole < count) {
        In last[Floats::lanes] = {};
        for (int i = whole; i < count; ++i) last[i - whole] = from[i];
        store(block.at + whole, load(last) * all(scale));
    }
}

template <class Out>
static inline void write_block(const Block& block, int count, Out* to) {
    const int whole = count / Floats::lanes * Floats::lanes;
    for (int i = 0; i < whole; i += Floats::lanes) store(to + i, load(block.at + i));
    if (whole < count) {
        Out last[Floats::lanes];
        store(last, load(block.at + whole));
        for (int i = whole; i < count; ++i) to[i] = last[i - whole];
    }
}

static inline void read_block(const void* from, std::int32_t dtype, std::int64_t start, int count, float scale,
                              Block& block) {
    switch (dtype) {
        case FASTFORGET_FLOAT32: return read_block(static_cast<const float*>(from) + start, count, scale, block);
        case FASTFORGET_BFLOAT16: return read_block(static_cast<const BFloat16*>(from) + start, count, scale, block);
        default: return read_block(static_cast<const Float16*>(from) + start, count, scale, block);
    }
}

static inline void write_block(const Block& block, int count, void* to, std::int32_t dtype, std::int64_t start) {
    switch (dtype) {
        case FASTFORGET_FLOAT32: return write_block(block, count, static_cast<float*>(to) + start);
        case FASTFORGET_BFLOAT16: return write_block(block, count, static_cast<BFloat16*>(to) + start);
        default: return write_block(block, count, static_cast<Float16*>(to) + start);
    }
}

static inline std::int64_t size_of_dtype(std::int32_t dtype) { return dtype == FASTFORGET_FLOAT32 ? 4 : 2; }

// One row of a tile's products, and how they become logits. `label`: its column in the tile; outside where it has none.
struct Logits {
    const void* row;
    std::int32_t dtype;
    const float* bias;  // of the tile's first column on
    float scale;
    float softcap;
    std::int64_t label;
    bool plain;  // float32 that already are logits

    Logits(const FastforgetTile& tile, const void* products, std::int64_t stride, std::int32_t type, std::int64_t index,
           std::int64_t label_column)
        : row(static_cast<const char*>(products) + index * stride * size_of_dtype(type)),
          dtype(type),
          bias(tile.bias == nullptr ? nullptr : tile.bias + tile.first),
          scale(tile.scale),
          softcap(tile.softcap),
          label(label_column),
          plain(type == FASTFORGET_FLOAT32 && bias == nullptr && scale == 1.0f && !(softcap > 0.0f)) {}

    // Logits that were finished and put down
    Logits(const float* finished, std::int64_t label_column)
        : row(finished), dtype(FASTFORGET_FLOAT32), bias(nullptr), scale(1.0f), softcap(0.0f), label(label_column), plain(true) {}

    bool has_label(std::int64_t start, int count) const { return label >= start && label < start + count; }

    const char* address(std::int64_t start) const { return static_cast<const char*>(row) + start * size_of_dtype(dtype); }

    // Scale, bias and softcap; the last vector is padded with `padding`
    void read(std::int64_t start, int count, float padding, Block& block) const {
        read_block(row, dtype, start, count, scale, block);
        const int end = whole_vectors(count);
        if (bias != nullptr) {
            Block part;
            read_block(bias + start, count, 1.0f, part);
            for (int i = 0; i < end; i += Floats::lanes) store(block.at + i, load(block.at + i) + load(part.at + i));
        }
        if (softcap > 0.0f) {
            const Floats cap = all(softcap);
            for (int i = 0; i < end; i += Floats::lanes) store(block.at + i, tanh_of(load(block.at + i) / cap) * cap);
        }
        pad(block, count, padding);
    }

    // The same without a copy, where there is nothing to do: plain logits, whole vectors, no label; else null.
    const float* in_place(std::int64_t start, int count) const {
        if (!plain || count % Floats::lanes != 0 || has_label(start, count)) return nullptr;
        return static_cast<const float*>(row) + start;
    }

    // Logits with -infinity at the label, whose own logit goes to `label_logit`, and past the end
    const float* others(std::int64_t start, int count, Block& copy, double& label_logit) const {
        if (const float* found = in_place(start, count)) return found;
        read(start, count, -INFINITY, copy);
        if (has_label(start, count)) {
            label_logit = copy.at[label - start];
            copy.at[label - start] = -INFINITY;
        }
        return copy.at;
    }
};

// d z / d (z before the cap) = 1 - (z / cap)^2; 1 where there is no cap
static inline Floats softcap_slope(Floats logits, float softcap) {
    const Floats ratio = logits / all(softcap);
    return all(1.0f) - ratio * ratio;
}
static inline float softcap_slope(float logit, float softcap) {
    return softcap > 0.0f ? 1.0f - (logit / softcap) * (logit / softcap) : 1.0f;
}

static inline float sum_of_block(const float* block, int count) {
    Floats sums[4] = {zero(), zero(), zero(), zero()};
    const int end = whole_vectors(count);
    int i = 0;
    for (; i + 4 * Floats::lanes <= end; i += 4 * Floats::lanes) {
        for (int k = 0; k < 4; ++k) sums[k] = sums[k] + load(block + i + k * Floats::lanes);
    }
    for (; i < end; i += Floats::lanes) sums[0] = sums[0] + load(block + i);
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The largest number of a block, -infinity where all are NaN
static inline float largest_of_block(const float* block, int count) {
    Floats top[4];
    for (Floats& each : top) each = all(-INFINITY);
    const int end = whole_vectors(count);
    int i = 0;
    for (; i + 4 * Floats::lanes <= end; i += 4 * Floats::lanes) {
        for (int k = 0; k < 4; ++k) top[k] = larger(load(block + i + k * Floats::lanes), top[k]);
    }
    for (; i < end; i += Floats::lanes) top[0] = larger(load(block + i), top[0]);
    return largest_of(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

#if defined(__GNUC__)
static inline void fetch(const void* address) { __builtin_prefetch(address); }
#else
static inline void fetch(const void*) {}
#endif

// The sum of e^(z - base) over a block; where KEEP, these weights too. Meanwhile the next block is asked for: a core's
// own guesses leave half of the memory's bandwidth unused. An address past the end does no harm.
template <bool KEEP>
static inline float weigh_block(const float* block, int count, float base, float* weights, const char* next) {
    Floats sums[4] = {zero(), zero(), zero(), zero()};
    const Floats shift = all(base);
    const int end = whole_vectors(count);
    int i = 0;
    for (; i + 4 * Floats::lanes <= end; i += 4 * Floats::lanes) {
        for (int k = 0; k < 4; ++k) {
            if (k % (16 / Floats::lanes) == 0) fetch(next + sizeof(float) * (i + k * Floats::lanes));
            const Floats weight = exp_of(load(block + i + k * Floats::lanes) - shift);
            if (KEEP) store(weights + i + k * Floats::lanes, weight);
            sums[k] = sums[k] + weight;
        }
    }
    for (; i < end; i += Floats::lanes) {
        const Floats weight = exp_of(load(block + i) - shift);
        if (KEEP) store(weights + i, weight);
        sums[0] = sums[0] + weight;
    }
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The largest logit to subtract: 0 where there was none, so that -infinity - top stays -infinity
static inline float finite_or_zero(float top) { return top == -INFINITY ? 0.0f : top; }

// 0 where the probability is 0, whatever the factor: infinite, or NaN as the difference of two logits of -infinity
static inline Floats times(Floats probability, Floats factor) {
    return select(at_most(probability, zero()), probability, probability * factor);
}

static inline void multiply_row(float* row, std::int64_t width, float factor) {
    std::int64_t i = 0;
    for (; i + Floats::lanes <= width; i += Floats::lanes) store(row + i, load(row + i) * all(factor));
    for (; i < width; ++i) row[i] *= factor;
}

// A row's accumulators, one of each name, between their reading and their writing
template <int COUNT>
struct Accumulators {
    double at[COUNT];

    void read(const double* from, std::int64_t stride, int count = COUNT) {
        for (int k = 0; k < COUNT; ++k) at[k] = k < count ? from[k * stride] : 0.0;
    }
    void write(double* to, std::int64_t stride, int count = COUNT) const {
        for (int k = 0; k < count; ++k) to[k * stride] = at[k];
    }
    double& operator[](int name) { return at[name]; }
    double operator[](int name) const { return at[name]; }
};

constexpr float LAZY = 30.0f;     // protocol.py's
constexpr float RECENTRE = 0.5f;  // protocol.py's
