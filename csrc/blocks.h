// Rows are worked on in blocks of BLOCK floats, in steps of four vectors. Where logits stand as they are to be read
// (float32, no scale, bias or softcap) and whole steps of them may be read, a block is their own memory; else it is a copy,
// in which all that is dealt with once, and what follows has whole steps of plain logits.

constexpr int STEP = 4 * LANES;

struct alignas(64) Block {
    float at[BLOCK];
};

static inline int length_of_block(std::int64_t start, std::int64_t end) {
    return end - start < BLOCK ? static_cast<int>(end - start) : BLOCK;
}

template <class In, class Out>
static inline void copy_block(const In* from, int count, float scale, Out* to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i) * all(scale));
    for (; i < count; ++i) narrow(widened(from[i]) * scale, to[i]);
}

static inline void read_rows(const FastforgetRows& rows, std::int64_t at, int count, float scale, float* to) {
    switch (rows.dtype) {
        case FASTFORGET_FLOAT32: return copy_block(static_cast<const float*>(rows.data) + at, count, scale, to);
        case FASTFORGET_BFLOAT16: return copy_block(static_cast<const BFloat16*>(rows.data) + at, count, scale, to);
        default: return copy_block(static_cast<const Float16*>(rows.data) + at, count, scale, to);
    }
}

// One row of a tile, a block at a time: its logits, and what is written for them
struct Row {
    const FastforgetTile& tile;
    const FastforgetRows& product;
    const FastforgetRows& written;
    const std::int64_t offset, written_offset;
    const std::int64_t label;  // its column in the tile, or one outside it
    const bool capped, plain, writes, narrow_writes, float16_writes;
    const float scale;  // of what is written
    Block copy;
    std::int64_t start = 0;  // the block in hand: its column, how many logits it has, how many with the last step filled up
    int count = 0, end = 0;
    float* z = nullptr;    // its logits
    float* out = nullptr;  // and what is written

    Row(const FastforgetTile& given, int side, std::int64_t row, bool scaled)
        : tile(given),
          product(given.products[side]),
          written(given.rows[side]),
          offset(row * product.stride),
          written_offset(row * written.stride),
          label(given.labels[row] < 0 ? -1 : given.labels[row] - given.first),
          capped(given.softcap > 0.0f),
          plain(product.dtype == FASTFORGET_FLOAT32 && given.scale == 1.0f && given.bias == nullptr && !capped),
          writes(written.data != nullptr),
          narrow_writes(writes && written.dtype != FASTFORGET_FLOAT32),
          float16_writes(writes && written.dtype == FASTFORGET_FLOAT16),
          scale(scaled && float16_writes ? FLOAT16_SCALE : 1.0f) {}

    bool has(std::int64_t column) const { return column >= start && column < start + count; }
    bool has_room() const { return end == count || start + end <= tile.padded; }
    float* written_floats() const { return static_cast<float*>(written.data) + written_offset; }

    // Takes a block of logits in hand, and the label's where it is among them; what fills up the last step is anything
    void read(std::int64_t from, double& label_logit) {
        start = from;
        count = length_of_block(start, tile.columns);
        end = (count + STEP - 1) / STEP * STEP;
        z = copy.at;
        if (plain && has_room() && !has(label)) {
            z = static_cast<float*>(product.data) + offset + start;
            return;
        }
        read_rows(product, offset + start, count, tile.scale, z);
        if (tile.bias != nullptr) {
            const float* const bias = tile.bias + tile.first + start;
            for (int i = 0; i < count; ++i) z[i] += bias[i];
        }
        const Floats cap = all(tile.softcap);
        for (int i = 0; capped && i < count; i += LANES) store(z + i, tanh_of(load(z + i) / cap) * cap);
        if (has(label)) label_logit = z[label - start];
    }

    void fill_up(float value) const {
        for (int i = count; i < end; ++i) z[i] = value;
    }

    // Minus infinity at the label, and where the last step is filled up
    void hide() const {
        fill_up(-INFINITY);
        if (has(label)) z[label - start] = -INFINITY;
    }

    // Where the block is written: in the row, or in the copy; null for no written rows
    float* open() {
        out = !writes ? nullptr : !narrow_writes && has_room() ? written_floats() + start : copy.at;
        return out;
    }

    // 0 at the label, whose slope may be infinite; then as `finish`
    void close() const {
        if (out != nullptr && has(label)) out[label - start] = 0.0f;
        finish();
    }

    // What is in the copy goes into the row
    void finish() const {
        if (out != copy.at) return;
        const std::int64_t at = written_offset + start;
        switch (written.dtype) {
            case FASTFORGET_FLOAT32: return copy_block(out, count, scale, static_cast<float*>(written.data) + at);
            case FASTFORGET_BFLOAT16: return copy_block(out, count, scale, static_cast<BFloat16*>(written.data) + at);
            default: return copy_block(out, count, scale, static_cast<Float16*>(written.data) + at);
        }
    }
};

// A pass's numbers of one row are a structure of them, in the order of protocol.py's names; `count` of them are there
template <class Names, class Number>
static inline void gather(Names& names, const Number* from, std::int64_t stride, int count = sizeof(Names) / sizeof(Number)) {
    Number values[sizeof(Names) / sizeof(Number)];
    std::memcpy(values, &names, sizeof(Names));
    for (int k = 0; k < count; ++k) values[k] = from[k * stride];
    std::memcpy(&names, values, sizeof(Names));
}

template <class Names>
static inline void scatter(const Names& names, double* to, std::int64_t stride, int count = sizeof(Names) / sizeof(double)) {
    double values[sizeof(Names) / sizeof(double)];
    std::memcpy(values, &names, sizeof(Names));
    for (int k = 0; k < count; ++k) to[k * stride] = values[k];
}

static inline void multiply_row(float* row, std::int64_t width, double factor) {
    for (std::int64_t i = 0; i < width; ++i) row[i] *= static_cast<float>(factor);
}

static inline float sum_of_four(const Floats (&sums)[4]) { return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])); }

static inline float sum_of_block(const float* block, int end) {
    Floats sums[4] = {zero(), zero(), zero(), zero()};
    for (int i = 0; i < end; i += STEP) {
        for (int k = 0; k < 4; ++k) sums[k] = sums[k] + load(block + i + k * LANES);
    }
    return sum_of_four(sums);
}

// The largest number of a block, -infinity where all are NaN
static inline float largest_of_block(const float* block, int end) {
    Floats top[4] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)};
    for (int i = 0; i < end; i += STEP) {
        for (int k = 0; k < 4; ++k) top[k] = larger(load(block + i + k * LANES), top[k]);
    }
    return largest_of(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

#if defined(__GNUC__)
static inline void fetch(const void* address) { __builtin_prefetch(address); }
#else
static inline void fetch(const void*) {}
#endif

static inline const char* block_after(const float* block) { return reinterpret_cast<const char*>(block + BLOCK); }

// The sum of e^(z - base) over a block; these weights too, where they have a place. Meanwhile the next block is asked for:
// a core's own guesses leave half of the memory's bandwidth unused. An address past the end does no harm.
static inline float weigh_block(const float* block, int end, float base, float* weights) {
    Floats sums[4] = {zero(), zero(), zero(), zero()};
    const Floats shift = all(base);
    for (int i = 0; i < end; i += STEP) {
        for (int k = 0; k < 4; ++k) {
            const int at = i + k * LANES;
            if (at % 16 == 0) fetch(block_after(block + at));
            const Floats weight = exp_of(load(block + at) - shift);
            if (weights != nullptr) store(weights + at, weight);
            sums[k] = sums[k] + weight;
        }
    }
    return sum_of_four(sums);
}

// The logit to subtract: 0 where there was none, so that -infinity stays what it is
static inline double finite_or_zero(double top) { return top == -INFINITY ? 0.0 : top; }

static inline double exp_between(double old_top, double new_top) {
    return old_top == -INFINITY ? 0.0 : ::exp(old_top - new_top);
}

// 0 where the factor is 0, however infinite the sum; NaN stays
static inline double times(double factor, double sum) {
    return factor == 0.0 && ::fabs(sum) == INFINITY ? 0.0 : factor * sum;
}
