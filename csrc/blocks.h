// Rows are worked on in blocks of BLOCK floats, in steps of four vectors. Where logits stand as they are to be read
// (float32, no scale, bias or softcap) and whole steps of them may be read, a block is their own memory; else it is a
// copy, in which all that is dealt with once, and what follows has whole steps of plain logits.

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

// Calls `use` with the elements of a matrix from `at` on, as what they are
template <class Use>
static inline void with_elements(const FastforgetRows& rows, std::int64_t at, const Use& use) {
    switch (rows.dtype) {
        case FASTFORGET_FLOAT32: return use(static_cast<float*>(rows.data) + at);
        case FASTFORGET_BFLOAT16: return use(static_cast<BFloat16*>(rows.data) + at);
        default: return use(static_cast<Float16*>(rows.data) + at);
    }
}

static inline void read_rows(const FastforgetRows& rows, std::int64_t at, int count, float scale, float* to) {
    with_elements(rows, at, [=](const auto* from) { copy_block(from, count, scale, to); });
}

// One row of a tile, a block at a time: its logits, and what is written for them
struct Row {
    const FastforgetTile& tile;
    const int side;  // which product's
    const std::int64_t number;
    const FastforgetRows &product = tile.products[side], &written = tile.rows[side];
    const std::int64_t offset = number * product.stride, written_offset = number * written.stride;
    const std::int64_t label = tile.labels[number] < 0 ? -1 : tile.labels[number] - tile.first;  // its column
    const bool capped = tile.softcap > 0.0f;
    const bool plain = product.dtype == FASTFORGET_FLOAT32 && tile.scale == 1.0f && tile.bias == nullptr && !capped;
    const bool writes = written.data != nullptr, narrow_writes = writes && written.dtype != FASTFORGET_FLOAT32;
    const bool float16_writes = writes && written.dtype == FASTFORGET_FLOAT16;
    const float scale;  // of what is written
    Block copy;
    std::int64_t start = 0;              // the block in hand: the column that it begins at,
    int count = 0, end = 0;              // how many logits it has, how many with the last step filled up,
    float *z = nullptr, *out = nullptr;  // these logits, and what is written

    Row(const FastforgetTile& given, int given_side, std::int64_t row, bool scaled)
        : tile(given), side(given_side), number(row), scale(scaled && float16_writes ? FLOAT16_SCALE : 1.0f) {}

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
        float* const logits = copy.at;  // a member would be read again after each store
        const int columns = count;
        read_rows(product, offset + start, columns, tile.scale, logits);
        if (tile.bias != nullptr) {
            const float* const bias = tile.bias + tile.first + start;
            for (int i = 0; i < columns; ++i) logits[i] += bias[i];
        }
        if (capped) {
            const Floats cap = all(tile.softcap);
            for (int i = 0; i < columns; i += LANES) store(logits + i, tanh_of(load(logits + i) / cap) * cap);
        }
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
        with_elements(written, written_offset + start, [this](auto* to) { copy_block(out, count, scale, to); });
    }
};

// A pass's numbers of one row are a structure of them, in the order of protocol.py's names
template <class Names, class Number>
static inline void gather(Names& names, const Number* from, std::int64_t stride, std::size_t count) {
    Number values[sizeof(Names) / sizeof(Number)];
    std::memcpy(values, &names, sizeof(Names));
    for (std::size_t k = 0; k < count; ++k) values[k] = from[k * stride];
    std::memcpy(&names, values, sizeof(Names));
}

// What a pass is given of a row
template <class Names>
static inline Names given_of(const FastforgetTile& tile, std::int64_t row) {
    Names names{};
    gather(names, tile.given + row, tile.row_count, sizeof(Names) / sizeof(float));
    return names;
}

// The accumulators of a row, or the first `count`; as a structure begins where this is the first tile
template <class Names>
static inline Names accumulators_of(const FastforgetTile& tile, std::int64_t row,
                                    std::size_t count = sizeof(Names) / sizeof(double)) {
    Names names;
    if (tile.first != 0) gather(names, tile.accumulators + row, tile.accumulators_stride, count);
    return names;
}

template <class Names>
static inline void keep(const Names& names, const FastforgetTile& tile, std::int64_t row,
                        std::size_t count = sizeof(Names) / sizeof(double)) {
    double values[sizeof(Names) / sizeof(double)];
    std::memcpy(values, &names, sizeof(Names));
    for (std::size_t k = 0; k < count; ++k) tile.accumulators[k * tile.accumulators_stride + row] = values[k];
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

// The sum of e^(z - base) over a block; these weights too, where they have a place. Meanwhile the next block is asked
// for: a core's own guesses leave half of the memory's bandwidth unused. An address past the end does no harm.
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

// Takes the same block of policy and reference in hand, without the label
static inline void read_pair(Row& policy, Row& reference, std::int64_t start, double& policy_label,
                             double& reference_label) {
    policy.read(start, policy_label);
    reference.read(start, reference_label);
    policy.hide();
    reference.hide();
}

// Writes two rows: `entries` makes both entries of a vector of each one's logits, and adds what `totals` are of
template <int TOTALS, class Entries>
static inline void write_pair(Row& policy, Row& reference, const Entries& entries, double (&totals)[TOTALS]) {
    const float *const z_p = policy.z, *const z_q = reference.z;
    float *const out = policy.open(), *const reference_out = reference.open();
    const int end = policy.end;  // members would be read again after each store
    const bool capped = policy.capped;
    const float softcap = policy.tile.softcap;
    Floats sums[TOTALS];
    for (Floats& sum : sums) sum = zero();
    for (int i = 0; i < end; i += LANES) {
        const Floats policy_logits = load(z_p + i);
        Floats entry, reference_entry;
        entries(policy_logits, load(z_q + i), entry, reference_entry, sums);
        if (capped) {
            const Floats slope = softcap_slope(policy_logits, softcap);
            entry = entry * slope;
            reference_entry = reference_entry * slope;
        }
        if (out != nullptr) store(out + i, entry);
        if (reference_out != nullptr) store(reference_out + i, reference_entry);
    }
    for (int k = 0; k < TOTALS; ++k) totals[k] += sum_of(sums[k]);
    policy.close();
    reference.close();
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
