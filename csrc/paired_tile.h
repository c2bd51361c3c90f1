// The paired pass: policy p and reference q side by side, for KL(q||p) = sum of q (expm1(d) - d), d = log p - log q.
//
// Two looks at a tile, as the base and the shift of its rows are known after the first: normalisers, then the sums and
// the rows. The gap is (z_p - z_q) - shift: where p is almost q the difference of logits is exact, and nothing cancels
// after it. Base and shift are float32 numbers, so that both looks and later tiles subtract the very numbers stored.

enum PairedName {
    POLICY_TOP, POLICY_TOTAL, REFERENCE_TOP, REFERENCE_TOTAL, GAP_MOMENT, BASE, SHIFT, DIFFERENCE, EXCESS,
    POLICY_LABEL, REFERENCE_LABEL, PAIRED_NAMES
};
using PairedSums = Accumulators<PAIRED_NAMES>;

// What a running top's total is multiplied with as a block comes in
static inline double raise_top(double& top, float largest) {
    if (!(largest > top)) return 1.0;
    const double fade = ::exp(top - largest);
    top = largest;
    return fade;
}

// One block's normalisers, and the weighted gaps of logits
static inline void add_normalisers(const float* policy, const float* reference, int count, const char* next_policy,
                                   const char* next_reference, PairedSums& found) {
    const double policy_fade = raise_top(found[POLICY_TOP], largest_of_block(policy, count));
    const float policy_base = finite_or_zero(static_cast<float>(found[POLICY_TOP]));
    found[POLICY_TOTAL] = found[POLICY_TOTAL] * policy_fade +
                          weigh_block<false>(policy, count, policy_base, nullptr, next_policy);
    const double fade = raise_top(found[REFERENCE_TOP], largest_of_block(reference, count));
    const Floats base = all(finite_or_zero(static_cast<float>(found[REFERENCE_TOP])));
    Floats sums[2] = {zero(), zero()}, moments[2] = {zero(), zero()};
    for (int i = 0; i < whole_vectors(count); i += Floats::lanes) {
        const int k = i / Floats::lanes % 2;
        if (i % 16 == 0) fetch(next_reference + sizeof(float) * i);
        const Floats z_q = load(reference + i), weight = exp_of(z_q - base);
        sums[k] = sums[k] + weight;
        moments[k] = moments[k] + times(weight, load(policy + i) - z_q);
    }
    found[REFERENCE_TOTAL] = found[REFERENCE_TOTAL] * fade + sum_of(sums[0] + sums[1]);
    found[GAP_MOMENT] = (fade == 1.0 ? found[GAP_MOMENT] : fade == 0.0 ? 0.0 : found[GAP_MOMENT] * fade) +
                        sum_of(moments[0] + moments[1]);
}

static inline double log_total(double top, double total) { return (top == -INFINITY ? 0.0 : top) + ::log(total); }

static inline double as_float(double x) { return static_cast<float>(x); }

// What S1 = sum of rows W and S2 = sum of e^(z_q - base) W are multiplied with: S1' = along S1 + (along - fade) S2,
// S2' = fade S2.
struct Moved {
    double along, fade;
};

// Set base and shift for this tile, and bring the sums so far, which went with `previous`, to them.
static inline Moved move_base(const PairedSums& previous, const float* given, bool first, PairedSums& found) {
    double shift = previous[SHIFT];
    if (given != nullptr) {
        shift = *given;
    } else {
        const double apart = log_total(found[POLICY_TOP], found[POLICY_TOTAL]) -
                             log_total(found[REFERENCE_TOP], found[REFERENCE_TOTAL]);
        if (::fabs(apart) < INFINITY && (first || ::fabs(apart - shift) > RECENTRE)) shift = as_float(apart);
    }
    const double top_p = as_float(found[POLICY_TOP] - shift), top_q = found[REFERENCE_TOP];
    const double largest = top_p > top_q ? top_p : top_q;
    const double base = largest > previous[BASE] + LAZY ? largest : previous[BASE];
    found[BASE] = base;
    found[SHIFT] = shift;
    if (first || previous[BASE] == -INFINITY) {  // nothing was added up but zeros
        return {1.0, 1.0};
    }
    const double old_shift = previous[SHIFT], fade = ::exp(previous[BASE] - base);
    const double along = ::exp((previous[BASE] - base) + (old_shift - shift));
    if (along == 1.0 && fade == 1.0) return {1.0, 1.0};
    const double scale = previous[REFERENCE_TOP] > -INFINITY ? ::exp(previous[REFERENCE_TOP] - previous[BASE]) : 0.0;
    const double mass = previous[REFERENCE_TOTAL] * scale;
    const double moment = (previous[GAP_MOMENT] - old_shift * previous[REFERENCE_TOTAL]) * scale;
    found[DIFFERENCE] = along * previous[DIFFERENCE] + (along - fade) * mass;
    if (previous[EXCESS] != INFINITY) {  // where q puts something on what p excludes, it stays infinite
        found[EXCESS] = along * previous[EXCESS] + (along - fade + fade * (shift - old_shift)) * mass + (along - fade) * moment;
    }
    return {along, fade};
}

static inline void move_sums(const Moved& moved, float* grad, float* reference_grad, std::int64_t width) {
    const Floats along = all(static_cast<float>(moved.along)), fade = all(static_cast<float>(moved.fade));
    const Floats across = all(static_cast<float>(moved.along - moved.fade));
    if (reference_grad == nullptr) return multiply_row(grad, width, static_cast<float>(moved.along));
    for (std::int64_t start = 0; start < width; start += Floats::lanes) {
        const int count = width - start < Floats::lanes ? static_cast<int>(width - start) : Floats::lanes;
        float policy_part[Floats::lanes] = {}, reference_part[Floats::lanes] = {};
        std::memcpy(policy_part, grad + start, sizeof(float) * count);
        std::memcpy(reference_part, reference_grad + start, sizeof(float) * count);
        const Floats reference = load(reference_part);
        store(policy_part, multiply_add(load(policy_part), along, across * reference));
        store(reference_part, reference * fade);
        std::memcpy(grad + start, policy_part, sizeof(float) * count);
        std::memcpy(reference_grad + start, reference_part, sizeof(float) * count);
    }
}

static void paired_tile(const FastforgetPairedTile& arguments, std::int64_t row) {
    const FastforgetTile& tile = arguments.tile;
    double* const accumulators = arguments.accumulators + row;
    PairedSums found{};
    if (tile.first == 0) {
        for (int name : {POLICY_TOP, REFERENCE_TOP, BASE, POLICY_LABEL, REFERENCE_LABEL}) found[name] = -INFINITY;
    } else {
        found.read(accumulators, arguments.accumulators_stride);
    }
    const PairedSums previous = found;
    const std::int64_t label_column = arguments.labels[row] < 0 ? -1 : arguments.labels[row] - tile.first;
    Logits policy(tile, arguments.policy, arguments.policy_stride, arguments.policy_dtype, row, label_column);
    Logits reference(tile, arguments.reference, arguments.reference_stride, arguments.reference_dtype, row, label_column);
    float* const out = arguments.rows == nullptr ? nullptr : arguments.rows + row * arguments.rows_stride;
    float* const reference_out = arguments.reference_rows == nullptr
                                     ? nullptr
                                     : arguments.reference_rows + row * arguments.reference_rows_stride;
    // logits that had to be finished are put down where the rows will stand, for the second look
    const bool keep_policy = out != nullptr && !policy.plain;
    const bool keep_reference = reference_out != nullptr && !reference.plain;
    Block block_p, block_q;
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        const int count = length_of_block(start, tile.columns);
        const float* from_p = policy.others(start, count, block_p, found[POLICY_LABEL]);
        const float* from_q = reference.others(start, count, block_q, found[REFERENCE_LABEL]);
        add_normalisers(from_p, from_q, count, policy.address(start + BLOCK), reference.address(start + BLOCK), found);
        if (keep_policy) write_block(block_p, count, out + start);
        if (keep_reference) write_block(block_q, count, reference_out + start);
    }
    if (keep_policy) policy = Logits(out, label_column);
    if (keep_reference) reference = Logits(reference_out, label_column);
    const Moved moved =
        move_base(previous, arguments.shift == nullptr ? nullptr : arguments.shift + row, tile.first == 0, found);
    if (arguments.grad != nullptr && tile.first != 0 && (moved.along != 1.0 || moved.fade != 1.0)) {
        move_sums(moved, arguments.grad + row * arguments.grad_stride,
                  arguments.reference_grad == nullptr
                      ? nullptr
                      : arguments.reference_grad + row * arguments.reference_grad_stride,
                  arguments.width);
    }
    const Floats shift = all(static_cast<float>(found[SHIFT])), near = all(NEAR);
    const Floats base = all(finite_or_zero(static_cast<float>(found[BASE])));
    const bool capped = tile.softcap > 0.0f;
    double unused = 0.0;
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        const int count = length_of_block(start, tile.columns), end = whole_vectors(count);
        const float* from_p = policy.others(start, count, block_p, unused);
        const float* from_q = reference.others(start, count, block_q, unused);
        float* const to = count == end && out != nullptr ? out + start : block_p.at;
        float* const to_q = count == end && reference_out != nullptr ? reference_out + start : block_q.at;
        Floats differences = zero(), excesses = zero();
        for (int i = 0; i < end; i += Floats::lanes) {
            const Floats z_p = load(from_p + i), z_q = load(from_q + i);
            const Floats gap = (z_p - z_q) - shift, close = clamp_near(gap), series = expm1_excess(close);
            const Mask is_near = at_most(size_of(gap), near);
            Floats q = exp_of(z_q - base), difference = q * (close + series), excess = q * series;
            if (!everywhere(is_near)) {  // as it mostly is, with a reference that is an earlier self
                const Floats apart = exp_of((z_p - shift) - base) - q;
                difference = select(is_near, difference, apart);
                excess = select(is_near, excess, larger(zero(), apart - times(q, gap)));
            }
            differences = differences + difference;
            excesses = excesses + excess;
            if (out == nullptr) continue;
            if (capped) {
                const Floats slope = softcap_slope(z_p, tile.softcap);
                difference = difference * slope;
                q = q * slope;
            }
            store(to + i, difference);
            if (reference_out != nullptr) store(to_q + i, q);
        }
        found[DIFFERENCE] += sum_of(differences);
        found[EXCESS] += sum_of(excesses);
        if (out == nullptr) continue;
        if (policy.has_label(start, count)) to[label_column - start] = to_q[label_column - start] = 0.0f;  // 0 times infinity
        if (to == block_p.at) write_block(block_p, count, out + start);
        if (to_q == block_q.at && reference_out != nullptr) write_block(block_q, count, reference_out + start);
    }
    found.write(accumulators, arguments.accumulators_stride);
}
