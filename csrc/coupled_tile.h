// The coupled pass: reverse KL or JSD, both normalisers known.
//
//     reverse KL   x = log p - log q    sums p (expm1(-x) + x)
//     JSD          x = log p - log m    sums the same of KL(p||m) and of KL(q||m), m = (p + q) / 2
//
// and both p (x - centre) and p, which are the rows.

// probability = share * e^(z - top), top the row's largest logit
struct Softmax {
    Floats top;
    Floats log_sum;
    Floats share;

    Softmax(float row_top, float log_total)
        : top(all(row_top)),
          log_sum(all(log_total)),
          share(all(static_cast<float>(::exp(-static_cast<double>(log_total))))) {}

    Floats log_of(Floats logits) const { return (logits - top) - log_sum; }

    Floats of(Floats logits) const { return exp_of(logits - top) * share; }
};

// log m - log p and log m - log q, m = (p + q) / 2: of gap = log p - log q, both exact where the two are close
static inline void above_mixture(Floats gap, Floats& above_p, Floats& above_q) {
    const Floats size = size_of(gap);
    const Floats smaller_side = log1p_of(expm1_of(zero() - size) * all(0.5f));  // from the larger probability
    const Floats larger_side = size + smaller_side;
    const Mask policy_less = at_most(gap, zero());
    above_p = select(policy_less, larger_side, smaller_side);
    above_q = select(policy_less, smaller_side, larger_side);
}

template <int KIND>
static void coupled_tile_of(const FastforgetCoupledTile& arguments, std::int64_t row) {
    const FastforgetTile& tile = arguments.tile;
    const bool capped = tile.softcap > 0.0f;
    const std::int64_t token = arguments.labels[row];
    const Logits policy(tile, arguments.policy, row, token), reference(tile, arguments.reference, row, token);
    const Written written(tile, arguments.rows, row, true), policy_written(tile, arguments.policy_rows, row, true);
    float normalisers[6];
    for (int k = 0; k < 6; ++k) normalisers[k] = arguments.normalisers[k * tile.row_count + row];
    const Softmax softmax_p(normalisers[0], normalisers[1]), softmax_q(normalisers[2], normalisers[3]);
    const Floats lse_gap = all(normalisers[4]), centre = all(normalisers[5]);
    const bool far = ::fabs(normalisers[4]) > NEAR_SHIFT;  // the plain difference of logits would round at that size
    double found[4] = {0.0, 0.0, 0.0, 0.0};
    Block policy_copy, reference_copy;
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        const int count = length_of_block(start, tile.columns);
        float* const z_p = policy.block(start, count, policy_copy);
        float* const z_q = reference.block(start, count, reference_copy);
        policy.hide(z_p, start, count);
        reference.hide(z_q, start, count);
        float* const out = written.block(start, count, policy_copy);
        float* const policy_out = policy_written.block(start, count, reference_copy);
        Floats sums[4] = {zero(), zero(), zero(), zero()};
        for (int i = 0; i < whole_vectors(count); i += Floats::lanes) {
            const Floats policy_logits = load(z_p + i), reference_logits = load(z_q + i);
            const Floats gap = far ? softmax_p.log_of(policy_logits) - softmax_q.log_of(reference_logits)
                                   : (policy_logits - reference_logits) - lse_gap;
            Floats p = softmax_p.of(policy_logits);
            const Floats q = softmax_q.of(reference_logits);
            Floats ratio;
            if (KIND == FASTFORGET_REVERSE_KL) {
                ratio = times(p, gap - centre);
                sums[1] = sums[1] + relative_entropy(p, q, zero() - gap);
            } else {
                Floats above_p, above_q;
                above_mixture(gap, above_p, above_q);
                const Floats mixture = (p + q) * all(0.5f);
                ratio = times(p, (zero() - above_p) - centre);
                sums[1] = sums[1] + relative_entropy(p, mixture, above_p);
                sums[2] = sums[2] + relative_entropy(q, mixture, above_q);
            }
            sums[0] = sums[0] + ratio;
            sums[3] = sums[3] + p;
            if (capped) {
                const Floats slope = softcap_slope(policy_logits, tile.softcap);
                ratio = ratio * slope;
                p = p * slope;
            }
            if (out != nullptr) store(out + i, ratio);
            if (policy_out != nullptr) store(policy_out + i, p);
        }
        for (int k = 0; k < 4; ++k) found[k] += sum_of(sums[k]);
        if (out != nullptr) written.close(out, start, count, policy_copy, policy.label);
        if (policy_out != nullptr) policy_written.close(policy_out, start, count, reference_copy, policy.label);
    }
    for (int k = 0; k < 4; ++k) {
        double* const to = arguments.accumulators + k * arguments.accumulators_stride + row;
        *to = tile.first == 0 ? found[k] : *to + found[k];
    }
}

static void coupled_tile(const FastforgetCoupledTile& arguments, std::int64_t row) {
    if (arguments.kind == FASTFORGET_REVERSE_KL) return coupled_tile_of<FASTFORGET_REVERSE_KL>(arguments, row);
    coupled_tile_of<FASTFORGET_JSD>(arguments, row);
}
