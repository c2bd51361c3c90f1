// The paired pass: policy p and reference q side by side, and the rows whose products are forward KL's gradient.
//
// Two looks at a tile, the second from a cache: the first brings the normalisers up to date, and with them base and
// shift; the second writes. The gap z_p - z_q is the plain difference of two logits before the shift is taken out of
// it: where p is almost q nothing cancels after it.

struct PairedAccumulators {
    double policy_top = -INFINITY, policy_total = 0.0, reference_top = -INFINITY, reference_total = 0.0;
    double gap_moment = 0.0, base = -INFINITY, shift = 0.0, difference = 0.0, excess = 0.0, policy_label = -INFINITY;
    double reference_label = -INFINITY;

    // Takes one more block into the normalisers
    void weigh(const Row& policy, const Row& reference) {
        const double policy_largest = largest_of_block(policy.z, policy.end);
        const double reference_largest = largest_of_block(reference.z, reference.end);
        if (policy_largest > policy_top) {
            policy_total *= exp_between(policy_top, policy_largest);
            policy_top = policy_largest;
        }
        if (reference_largest > reference_top) {
            const double fade = exp_between(reference_top, reference_largest);
            reference_total *= fade;
            gap_moment = times(fade, gap_moment);
            reference_top = reference_largest;
        }
        const Floats policy_base = all(static_cast<float>(finite_or_zero(policy_top)));
        const Floats reference_base = all(static_cast<float>(finite_or_zero(reference_top)));
        const float *const policy_logits = policy.z, *const reference_logits = reference.z;
        Floats sums[2] = {zero(), zero()}, totals[2] = {zero(), zero()}, moments[2] = {zero(), zero()};
        for (int i = 0; i < policy.end; i += 2 * LANES) {
            for (int k = 0; k < 2; ++k) {
                const int at = i + k * LANES;
                if (at % 16 == 0) {  // a cache line of both rows' next block
                    fetch(block_after(policy_logits + at));
                    fetch(block_after(reference_logits + at));
                }
                const Floats z_p = load(policy_logits + at), z_q = load(reference_logits + at);
                const Floats weight = exp_of(z_q - reference_base);
                sums[k] = sums[k] + exp_of(z_p - policy_base);
                totals[k] = totals[k] + weight;
                moments[k] = moments[k] + times(weight, z_p - z_q);
            }
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

// Sets base and shift as the normalisers want them, both as floats hold them (what is stored is what was computed
// with), and brings the sums to them; `before`: the accumulators without this tile
static inline Move move_base(PairedAccumulators& found, const PairedAccumulators& before, const float* given_shift,
                             bool strict) {
    const bool begun = before.base != -INFINITY;
    if (given_shift != nullptr) {
        found.shift = *given_shift;
    } else {
        const double apart = (finite_or_zero(found.policy_top) + ::log(found.policy_total)) -
                             (finite_or_zero(found.reference_top) + ::log(found.reference_total));
        const bool settled = begun && !(::fabs(apart - before.shift) > RECENTRE);
        if (::fabs(apart) < INFINITY && !settled) found.shift = static_cast<float>(apart);
    }
    const double over = found.policy_top - found.shift;
    const double largest = over > found.reference_top ? over : found.reference_top;
    const bool shifted = found.shift != before.shift, no_reference = before.reference_top == -INFINITY;
    // the base of a policy alone goes with its shift: the reference may lie far below it
    const bool anew = no_reference && shifted;
    if (anew || largest > (strict ? before.base : before.base + LAZY)) found.base = static_cast<float>(largest);
    Move move;
    if (!begun) return move;  // nothing has been summed
    // where one of the two has had no logit its part of the sums is 0, however far base and shift have moved
    const double moved = before.base - found.base, moved_shift = before.shift - found.shift;
    move.fade = no_reference ? 0.0 : ::exp(moved);
    move.along = shifted && before.policy_top == -INFINITY ? 0.0 : ::exp(moved + moved_shift);
    move.across = move.along - move.fade;
    const double scale = exp_between(before.reference_top, before.base), mass = before.reference_total * scale;
    const double moment = times(scale, before.gap_moment - before.shift * before.reference_total);
    found.difference = move.along * found.difference + move.across * mass;
    if (found.excess == INFINITY) return move;  // and so is the moment, of the other sign
    const double of_mass = move.across - move.fade * moved_shift;
    found.excess = move.along * found.excess + of_mass * mass + times(move.across, moment);
    return move;
}

static inline void move_grads(const FastforgetTile& tile, std::int64_t row, const Move& move) {
    const FastforgetRows &written = tile.grads[0], &reference_written = tile.grads[1];
    if (written.data == nullptr) return;
    float* const grad = static_cast<float*>(written.data) + row * written.stride;
    if (move.along != 1.0) multiply_row(grad, tile.width, move.along);
    if (reference_written.data == nullptr) return;
    float* const reference = static_cast<float*>(reference_written.data) + row * reference_written.stride;
    const float across = static_cast<float>(move.across);
    for (std::int64_t i = 0; across != 0.0f && i < tile.width; ++i) grad[i] += reference[i] * across;
    if (move.fade != 1.0) multiply_row(reference, tile.width, move.fade);
}

static void paired_tile(const FastforgetTile& tile, std::int64_t number) {
    Row policy(tile, 0, number, true), reference(tile, 1, number, true);
    auto found = accumulators_of<PairedAccumulators>(tile, number);
    const PairedAccumulators before = found;
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        read_pair(policy, reference, start, found.policy_label, found.reference_label);
        found.weigh(policy, reference);
    }
    const float* const given_shift = tile.given == nullptr ? nullptr : tile.given + number;
    move_grads(tile, number, move_base(found, before, given_shift, policy.float16_writes));
    const Floats base = all(static_cast<float>(finite_or_zero(found.base)));
    const Floats shift = all(static_cast<float>(found.shift));
    // Taken off one by one, base and shift would cost a far policy its digits, and their sum is no float where both are
    // large: what it rounds to first, then the rest.
    const double sum = finite_or_zero(found.base) + found.shift;
    const float rounded_sum = static_cast<float>(sum);
    const Floats policy_base = all(rounded_sum), rest = all(static_cast<float>(sum - rounded_sum));
    const bool far_shift = ::fabs(found.shift) > NEAR_SHIFT;  // the plain difference of logits would round at its size
    const auto entries = [&](Floats policy_logits, Floats reference_logits, Floats& difference, Floats& probability,
                             Floats* sums) {
        const Floats above = (policy_logits - policy_base) - rest, offset = reference_logits - base;
        const Floats gap = far_shift ? above - offset : (policy_logits - reference_logits) - shift;
        probability = exp_of(offset);
        const Floats close = clamp_near(gap), over = expm1_excess(close);
        const Mask is_near = at_most(size_of(gap), all(NEAR));
        difference = probability * (close + over);
        Floats excess = probability * over;
        if (!everywhere(is_near)) {  // as it mostly is, with a reference that is an earlier self
            const Floats far = exp_of(above) - probability;
            difference = select(is_near, difference, far);
            excess = select(is_near, excess, larger(zero(), far - times(probability, gap)));
        }
        sums[0] = sums[0] + difference;
        sums[1] = sums[1] + excess;
    };
    double sums[2] = {found.difference, found.excess};
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        read_pair(policy, reference, start, found.policy_label, found.reference_label);
        write_pair(policy, reference, entries, sums);
    }
    found.difference = sums[0];
    found.excess = sums[1];
    keep(found, tile, number);
}
