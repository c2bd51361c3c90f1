// Rows are worked on in blocks of BLOCK floats. Where logits stand as they are to be read (float32, no scale, bias or
// softcap) and whole vectors of them may be read, a block is their own memory; else it is a copy, in which all that and
// the rest that fills no vector are dealt with once, and what follows has whole vectors of plain logits.

struct alignas(64) Block {
    float at[BLOCK];
};

static inline int whole_vectors(int count) { return (count + Floats::lanes - 1) / Floats::lanes * Floats::lanes; }

static inline int length_of_block(std::int64_t start, std::int64_t end) {
    return end - start < BLOCK ? static_cast<int>(end - start) : BLOCK;
}

template <class In>
static inline void read_block(const In* from, int count, float scale, float* to) {
    const int whole = count / Floats::lanes * Floats::lanes;
    for (int i = 0; i < whole; i += Floats::lanes) store(to + i, load(from + i) * all(scale));
    if (whole < count) {
        In last[Floats::lanes] = {};
        for (int i = whole; i < count; ++i) last[i - whole] = from[i];
        store(to + whole, load(last) * all(scale));
    }
}

template <class Out>
static inline void write_block(const float* from, int count, float scale, Out* to) {
    const int whole = count / Floats::lanes * Floats::lanes;
    for (int i = 0; i < whole; i += Floats::lanes) store(to + i, load(from + i) * all(scale));
    if (whole < count) {
        Out last[Floats::lanes];
        store(last, load(from + whole) * all(scale));
        for (int i = whole; i < count; ++i) to[i] = last[i - whole];
    }
}

static inline void read_rows(const FastforgetRows& rows, std::int64_t at, int count, float scale, float* to) {
    switch (rows.dtype) {
        case FASTFORGET_FLOAT32: return read_block(static_cast<const float*>(rows.data) + at, count, scale, to);
        case FASTFORGET_BFLOAT16: return read_block(static_cast<const BFloat16*>(rows.data) + at, count, scale, to);
        default: return read_block(static_cast<const Float16*>(rows.data) + at, count, scale, to);
    }
}

// One row's logits of a tile
struct Logits {
    const FastforgetTile& tile;
    const FastforgetRows& product;
    std::int64_t offset;  // of the row
    std::int64_t label;   // the label's column in the tile, or one outside it
    bool in_place;        // as far as whole vectors may be read

    Logits(const FastforgetTile& given, const FastforgetRows& rows, std::int64_t row, std::int64_t token)
        : tile(given), product(rows), offset(row * rows.stride), label(token < 0 ? -1 : token - given.first) {
        const bool plain = tile.scale == 1.0f && tile.bias == nullptr && !(tile.softcap > 0.0f);
        in_place = plain && product.dtype == FASTFORGET_FLOAT32;
    }

    bool has_label(std::int64_t start, int count) const { return label >= start && label < start + count; }

    // `count` logits from `start` on; what fills up the last vector is anything
    float* block(std::int64_t start, int count, Block& copy) const {
        if (in_place && !has_label(start, count)) {
            const std::int64_t end = start + whole_vectors(count);
            if (end == start + count || end <= tile.padded) return static_cast<float*>(product.data) + offset + start;
        }
        read_rows(product, offset + start, count, tile.scale, copy.at);
        const int end = whole_vectors(count);
        if (tile.bias != nullptr) {
            const float* const bias = tile.bias + tile.first + start;
            const int whole = count / Floats::lanes * Floats::lanes;
            for (int i = 0; i < whole; i += Floats::lanes) store(copy.at + i, load(copy.at + i) + load(bias + i));
            for (int i = whole; i < count; ++i) copy.at[i] += bias[i];
        }
        if (tile.softcap > 0.0f) {
            const Floats cap = all(tile.softcap);
            for (int i = 0; i < end; i += Floats::lanes) {
                store(copy.at + i, tanh_of(load(copy.at + i) / cap) * cap);
            }
        }
        return copy.at;
    }

    // Minus infinity at the label, and where the last vector is filled up
    void hide(float* block, std::int64_t start, int count) const {
        fill_up(block, count, -INFINITY);
        if (has_label(start, count)) block[label - start] = -INFINITY;
    }

    // The logit at the label, where it is in this block (which it may be hidden in afterwards)
    void look_for_label(const float* block, std::int64_t start, int count, double& found) const {
        if (has_label(start, count)) found = block[label - start];
    }

    static void fill_up(float* block, int count, float value) {
        for (int i = count; i < whole_vectors(count); ++i) block[i] = value;
    }
};

// One row that is written
struct Written {
    const FastforgetTile& tile;
    const FastforgetRows& rows;
    std::int64_t offset;
    float scale;

    Written(const FastforgetTile& given, const FastforgetRows& to, std::int64_t row, bool scaled)
        : tile(given), rows(to), offset(row * to.stride), scale(scaled && is_float16() ? FLOAT16_SCALE : 1.0f) {}

    bool is_float16() const { return rows.data != nullptr && rows.dtype == FASTFORGET_FLOAT16; }
    bool is_narrow() const { return rows.data != nullptr && rows.dtype != FASTFORGET_FLOAT32; }

    // Where whole vectors go that begin at `start`: into the row, or into a copy; null where nothing is written
    float* block(std::int64_t start, int count, Block& copy) const {
        if (rows.data == nullptr) return nullptr;
        const std::int64_t end = start + whole_vectors(count);
        const bool in_place = !is_narrow() && (end == start + count || end <= tile.padded);
        return in_place ? static_cast<float*>(rows.data) + offset + start : copy.at;
    }

    // 0 at the label, whose slope may be infinite; then as `finish`
    void close(float* block, std::int64_t start, int count, const Block& copy, std::int64_t label) const {
        if (label >= start && label < start + count) block[label - start] = 0.0f;
        finish(block, start, count, copy);
    }

    // What is in a copy goes into the row
    void finish(const float* block, std::int64_t start, int count, const Block& copy) const {
        if (block != copy.at) return;
        const std::int64_t at = offset + start;
        switch (rows.dtype) {
            case FASTFORGET_FLOAT32: return write_block(block, count, scale, static_cast<float*>(rows.data) + at);
            case FASTFORGET_BFLOAT16: return write_block(block, count, scale, static_cast<BFloat16*>(rows.data) + at);
            default: return write_block(block, count, scale, static_cast<Float16*>(rows.data) + at);
        }
    }
};

static inline void multiply_row(float* row, std::int64_t width, double factor) {
    const Floats factors = all(static_cast<float>(factor));
    std::int64_t i = 0;
    for (; i + Floats::lanes <= width; i += Floats::lanes) store(row + i, load(row + i) * factors);
    for (; i < width; ++i) row[i] *= static_cast<float>(factor);
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

static inline const char* block_after(const float* block) { return reinterpret_cast<const char*>(block + BLOCK); }

// The logit to subtract: 0 where there was none, so that -infinity stays what it is
static inline double finite_or_zero(double top) { return top == -INFINITY ? 0.0 : top; }

static inline double exp_between(double old_top, double new_top) {
    return old_top == -INFINITY ? 0.0 : ::exp(old_top - new_top);
}

// 0 where the factor is 0, however infinite the sum; NaN stays
static inline double times(double factor, double sum) {
    return factor == 0.0 && ::fabs(sum) == INFINITY ? 0.0 : factor * sum;
}
