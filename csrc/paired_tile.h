// The paired pass: policy p and reference q side by side, and the rows whose products are forward KL's gradient.
//
// Two looks at a tile, the second from a cache: the first brings the normalisers up to date, and with them base and shift;
// the second writes. The gap z_p - z_q is the plain difference of two logits before the shift is taken out of it: where p
// is almost q nothing cancels after it.

struct PairedState {
    double policy_top = -INFINITY;
    double policy_total = 0.0;
    double reference_top = -INFINITY;
    double reference_total = 0.0;
    double gap_moment = 0.0;
    double base = -INFINITY;
    double shift = 0.0;
    double difference = 0.0;
    double excess = 0.0;
    double policy_label = -INFINITY;
    double reference_label = -INFINITY;

    void load_from(const double* from, std::int64_t step) {
        double* const values[] = {&policy_top, &policy_total, &reference_top, &reference_total, &gap_moment,     &base,
                                  &shift,      &difference,   &excess,        &policy_label,    &reference_label};
        for (int k = 0; k < 11; ++k) *values[k] = from[k * step];
    }

    void store_to(double* to, std::int64_t step) const {
        const double values[] = {policy_top, policy_total, reference_top, reference_total, gap_moment,     base,
                                 shift,      difference,   excess,        policy_label,    reference_label};
        for (int k = 0; k < 11; ++k) to[k * step] = values[k];
    }

    // Normalisers of one more block
    void weigh(const float* policy, const float* reference, int count) {
        const double policy_largest = largest_of_block(policy, count), largest = largest_of_block(reference, count);
        if (policy_largest > policy_top) {
            policy_total *= exp_between(policy_top, policy_largest);
            policy_top = policy_largest;
        }
        if (largest > reference_top) {
            const double fade = exp_between(reference_top, largest);
            reference_total *= fade;
            gap_moment = times(fade, gap_moment);
            reference_top = largest;
        }
        const Floats policy_base = all(static_cast<float>(finite_or_zero(policy_top)));
        const Floats reference_base = all(static_cast<float>(finite_or_zero(reference_top)));
        Floats sums[2] = {zero(), zero()}, totals[2] = {zero(), zero()}, moments[2] = {zero(), zero()};
        for (int i = 0; i < whole_vectors(count); i += Floats::lanes) {
            if (i % 16 == 0) {  // a cache line of both rows' next block
                fetch(block_after(policy + i));
                fetch(block_after(reference + i));
            }
            const int k = i / Floats::lanes % 2;
            const Floats z_p = load(policy + i), z_q = load(reference + i);
            const Floats weight = exp_of(z_q - reference_base);
            sums[k] = sums[k] + exp_of(z_p - policy_base);
            totals[k] = totals[k] + weight;
            moments[k] = moments[k] + times(weight, z_p - z_q);
        }
        policy_total += sum_of(sums[0] + sums[1]);
        reference_total += sum_of(totals[0] + totals[1]);
        gap_moment += sum_of(moments[0] + moments[1]);
    }
};

// What base and shift do to what was accumulated: S1' = along S1 + across S2, S2' = fade S2, across = along - fade
struct Move {
    double along = 1.0;
    double across = 0.0;
    double fade = 1.0;
};

// Sets base and shift as the normalisers want them, both as floats hold them: what is stored is what was computed with
static inline Move move_base(PairedState& state, const float* given_shift, bool strict, bool first) {
    const double old_base = state.base, old_shift = state.shift;
    if (given_shift != nullptr) {
        state.shift = *given_shift;
    } else {
        const double apart = (finite_or_zero(state.policy_top) + ::log(state.policy_total)) -
                             (finite_or_zero(state.reference_top) + ::log(state.reference_total));
        const bool settled = !first && !(::fabs(apart - old_shift) > RECENTRE);
        if (::fabs(apart) < INFINITY && !settled) state.shift = static_cast<float>(apart);
    }
    const double over = state.policy_top - state.shift;
    const double largest = over > state.reference_top ? over : state.reference_top;
    if (largest > (strict ? old_base : old_base + LAZY)) state.base = static_cast<float>(largest);
    Move move;
    if (first || old_base == -INFINITY) return move;  // nothing has been summed
    move.fade = ::exp(old_base - state.base);
    move.along = ::exp((old_base - state.base) + (old_shift - state.shift));
    move.across = move.along - move.fade;
    return move;
}

// Brings the sums to another base and shift; `before`: the normalisers without this tile
static inline void follow(PairedState& state, const Move& move, const PairedState& before) {
    state.difference = times(move.along, state.difference);
    state.excess = times(move.along, state.excess);
    if (move.across == 0.0) return;
    const double scale = exp_between(before.reference_top, before.base);
    const double mass = before.reference_total * scale;
    const double moment = times(scale, before.gap_moment - before.shift * before.reference_total);
    state.difference += move.across * mass;
    if (before.excess == INFINITY) return;  // and so is the moment, of the other sign
    state.excess += (move.across + move.fade * (state.shift - before.shift)) * mass + move.across * moment;
}

static inline void move_grads(const FastforgetPairedTile& arguments, std::int64_t row, const Move& move) {
    if (arguments.grad == nullptr || (move.along == 1.0 && move.fade == 1.0)) return;
    const std::int64_t width = arguments.width;
    float* const grad = arguments.grad + row * arguments.grad_stride;
    if (move.along != 1.0) multiply_row(grad, width, move.along);
    if (arguments.reference_grad == nullptr) return;
    float* const reference = arguments.reference_grad + row * arguments.reference_grad_stride;
    if (move.across != 0.0) {
        const float across = static_cast<float>(move.across);
        std::int64_t i = 0;
        for (; i + Floats::lanes <= width; i += Floats::lanes) {
            store(grad + i, multiply_add(load(reference + i), all(across), load(grad + i)));
        }
        for (; i < width; ++i) grad[i] += reference[i] * across;
    }
    if (move.fade != 1.0) multiply_row(reference, width, move.fade);
}

static void paired_tile(const FastforgetPairedTile& arguments, std::int64_t row) {
    const FastforgetTile& tile = arguments.tile;
    const bool first = tile.first == 0, capped = tile.softcap > 0.0f;
    const std::int64_t token = arguments.labels[row];
    const Logits policy(tile, arguments.policy, row, token), reference(tile, arguments.reference, row, token);
    const Written written(tile, arguments.rows, row, true);
    const Written reference_written(tile, arguments.reference_rows, row, true);
    double* const accumulators = arguments.accumulators + row;
    PairedState state;
    if (!first) state.load_from(accumulators, arguments.accumulators_stride);
    const PairedState before = state;
    Block policy_copy, reference_copy;
    float *z_p, *z_q;
    const auto look_at = [&](std::int64_t start, int count) {
        z_p = policy.block(start, count, policy_copy);
        z_q = reference.block(start, count, reference_copy);
        policy.look_for_label(z_p, start, count, state.policy_label);
        reference.look_for_label(z_q, start, count, state.reference_label);
        policy.hide(z_p, start, count);
        reference.hide(z_q, start, count);
    };
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        const int count = length_of_block(start, tile.columns);
        look_at(start, count);
        state.weigh(z_p, z_q, count);
    }
    const float* const given_shift = arguments.shift == nullptr ? nullptr : arguments.shift + row;
    const Move move = move_base(state, given_shift, written.is_float16(), first);
    follow(state, move, before);
    if (!first) move_grads(arguments, row, move);
    const Floats base = all(static_cast<float>(finite_or_zero(state.base))), shift = all(static_cast<float>(state.shift));
    const Floats policy_base = base + shift;  // taken off one by one, they would cost a far policy its digits
    const Floats near = all(NEAR);
    // with a large shift the gap rounds at its size: rows are plain differences then
    const Floats near_row = all(::fabs(state.shift) <= NEAR_SHIFT ? NEAR : -1.0f);
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        const int count = length_of_block(start, tile.columns);
        look_at(start, count);
        float* const out = written.block(start, count, policy_copy);
        float* const reference_out = reference_written.block(start, count, reference_copy);
        Floats differences = zero(), excesses = zero();
        for (int i = 0; i < whole_vectors(count); i += Floats::lanes) {
            const Floats policy_logits = load(z_p + i), reference_logits = load(z_q + i);
            const Floats gap = (policy_logits - reference_logits) - shift;
            Floats probability = exp_of(reference_logits - base);
            const Floats close = clamp_near(gap), over = expm1_excess(close);
            const Mask is_near = at_most(size_of(gap), near);
            Floats difference = probability * (close + over), excess = probability * over;
            if (!everywhere(at_most(size_of(gap), near_row))) {  // as it mostly is, with a reference that is an earlier self
                const Floats far = exp_of(policy_logits - policy_base) - probability;
                difference = select(at_most(size_of(gap), near_row), difference, far);
                excess = select(is_near, excess, larger(zero(), far - times(probability, gap)));
            }
            differences = differences + difference;
            excesses = excesses + excess;
            if (capped) {
                const Floats slope = softcap_slope(policy_logits, tile.softcap);
                difference = difference * slope;
                probability = probability * slope;
            }
            if (out != nullptr) store(out + i, difference);
            if (reference_out != nullptr) store(reference_out + i, probability);
        }
        state.difference += sum_of(differences);
        state.excess += sum_of(excesses);
        if (out != nullptr) written.close(out, start, count, policy_copy, policy.label);
        if (reference_out != nullptr) reference_written.close(reference_out, start, count, reference_copy, policy.label);
    }
    state.store_to(accumulators, arguments.accumulators_stride);
}
