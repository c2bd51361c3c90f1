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

struct CoupledNormalisers {
    float policy_top;
    float policy_log_total;
    float reference_top;
    float reference_log_total;
    float lse_gap;
    float centre;
};

struct CoupledAccumulators {
    double ratio = 0.0;
    double from_policy = 0.0;
    double from_reference = 0.0;
    double probability = 0.0;
};

template <FastforgetPass KIND>
static void coupled_tile(const FastforgetTile& tile, std::int64_t number) {
    Row policy(tile, 0, number, true), reference(tile, 1, number, true);
    CoupledNormalisers given{};
    gather(given, tile.given + number, tile.row_count);
    const Softmax softmax_p(given.policy_top, given.policy_log_total);
    const Softmax softmax_q(given.reference_top, given.reference_log_total);
    const Floats lse_gap = all(given.lse_gap), centre = all(given.centre);
    const bool capped = policy.capped;
    const bool far = ::fabs(given.lse_gap) > NEAR_SHIFT;  // the plain difference of logits would round at that size
    CoupledAccumulators found;
    if (tile.first != 0) gather(found, tile.accumulators + number, tile.accumulators_stride);
    double label_logit;  // which the normalisers' sweeps have found
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        policy.read(start, label_logit);
        reference.read(start, label_logit);
        policy.hide();
        reference.hide();
        const float *const z_p = policy.z, *const z_q = reference.z;
        float *const out = policy.open(), *const policy_out = reference.open();
        Floats ratios = zero(), from_policy = zero(), from_reference = zero(), probabilities = zero();
        const int end = policy.end;
        for (int i = 0; i < end; i += LANES) {
            const Floats policy_logits = load(z_p + i), reference_logits = load(z_q + i);
            const Floats gap = far ? softmax_p.log_of(policy_logits) - softmax_q.log_of(reference_logits)
                                   : (policy_logits - reference_logits) - lse_gap;
            Floats p = softmax_p.of(policy_logits), ratio;
            const Floats q = softmax_q.of(reference_logits);
            if (KIND == FASTFORGET_REVERSE_KL) {
                ratio = times(p, gap - centre);
                from_policy = from_policy + relative_entropy(p, q, zero() - gap);
            } else {
                Floats above_p, above_q;
                above_mixture(gap, above_p, above_q);
                const Floats mixture = (p + q) * all(0.5f);
                ratio = times(p, (zero() - above_p) - centre);
                from_policy = from_policy + relative_entropy(p, mixture, above_p);
                from_reference = from_reference + relative_entropy(q, mixture, above_q);
            }
            ratios = ratios + ratio;
            probabilities = probabilities + p;
            if (capped) {
                const Floats slope = softcap_slope(policy_logits, tile.softcap);
                ratio = ratio * slope;
                p = p * slope;
            }
            if (out != nullptr) store(out + i, ratio);
            if (policy_out != nullptr) store(policy_out + i, p);
        }
        found.ratio += sum_of(ratios);
        found.from_policy += sum_of(from_policy);
        found.from_reference += sum_of(from_reference);
        found.probability += sum_of(probabilities);
        policy.close();
        reference.close();
    }
    scatter(found, tile.accumulators + number, tile.accumulators_stride);
}
