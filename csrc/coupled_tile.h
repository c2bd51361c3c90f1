// The coupled pass: reverse KL or JSD, both normalisers known.
//
//     reverse KL   x = log p - log q    sums p (expm1(-x) + x)
//     JSD          x = log p - log m    sums the same of KL(p||m) and of KL(q||m), m = (p + q) / 2
//
// and both p (x - centre) and p, which are the rows.

// probability = share * e^(z - top), top the row's largest logit
struct Softmax {
    Floats top, log_sum, share;

    Softmax(float row_top, float log_total)
        : top(all(row_top)), log_sum(all(log_total)), share(all(static_cast<float>(::exp(-double{log_total})))) {}
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

struct CoupledNormalisers {
    float policy_top, policy_log_total, reference_top, reference_log_total, lse_gap, centre;
};

struct CoupledAccumulators {
    double ratio = 0.0, from_policy = 0.0, from_reference = 0.0, probability = 0.0;
};

template <FastforgetPass KIND>
static void coupled_tile(const FastforgetTile& tile, std::int64_t number) {
    Row policy(tile, 0, number, true), reference(tile, 1, number, true);
    const auto given = given_of<CoupledNormalisers>(tile, number);
    const Softmax softmax_p(given.policy_top, given.policy_log_total);
    const Softmax softmax_q(given.reference_top, given.reference_log_total);
    const Floats lse_gap = all(given.lse_gap), centre = all(given.centre);
    const bool far = ::fabs(given.lse_gap) > NEAR_SHIFT;  // the plain difference of logits would round at that size
    const auto entries = [&](Floats policy_logits, Floats reference_logits, Floats& ratio, Floats& p, Floats* sums) {
        const Floats gap = far ? softmax_p.log_of(policy_logits) - softmax_q.log_of(reference_logits)
                               : (policy_logits - reference_logits) - lse_gap;
        p = softmax_p.of(policy_logits);
        const Floats q = softmax_q.of(reference_logits);
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
    };
    auto found = accumulators_of<CoupledAccumulators>(tile, number);
    double sums[4] = {found.ratio, found.from_policy, found.from_reference, found.probability};
    double label_logit;  // which the normalisers' sweeps have found
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        read_pair(policy, reference, start, label_logit, label_logit);
        write_pair(policy, reference, entries, sums);
    }
    found = {sums[0], sums[1], sums[2], sums[3]};
    keep(found, tile, number);
}
