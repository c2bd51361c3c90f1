// The paired row pass: a divergence of policy p from reference q, and its gradient over the logits.
//
//     forward KL(q||p)   sum of q (expm1(d) - d),  d = log p - log q     row  p - q
//     reverse KL(p||q)   sum of p (expm1(-d) + d)                        row  p (d - KL)
//     JSD                half of KL(p||m) and KL(q||m), m = (p + q) / 2  row  p/2 (log p - log m - KL(p||m))
//
// d is (z_p - z_q) - (lse_p - lse_q): where p is almost q the difference of logits is exact, and nothing cancels after it.
// Where the two lse are far apart that would round at their distance, and both rows of logits are first centred on their
// largest.
//
// The reference's logit of a row's label may be shifted (UNDIAL). That token is then left out of scans and loops, and what
// it adds to the value computed from log-probabilities that keep their digits up to p_y = 1. Its entry in the row is minus
// the sum of all others: where p_y and q_y are both almost 1, their difference is that of the tiny 1 - q_y and 1 - p_y.

struct Softmax {
    Floats base;   // the largest logit
    Floats share;  // one over the sum of e^(z - base)
    double log_total;  // of that sum
    double lse;
    double label_log_prob;  // of the token that the scan left out

    // `label_logit`: that token's, -infinity where the scan left none out
    Softmax(const FastforgetLabelState& others, float label_logit) {
        const float top = finite_or_zero(others.top > label_logit ? others.top : label_logit);
        const double total =
            others.total * ::exp(static_cast<double>(others.top) - top) + ::exp(static_cast<double>(label_logit) - top);
        base = all(top);
        share = all(static_cast<float>(1.0 / total));
        log_total = ::log(total);
        lse = top + log_total;
        const double gap = static_cast<double>(label_logit) - finite_or_zero(others.top);
        label_log_prob = -softplus(::log(others.total) - gap);
    }

    Floats of(Floats logits) const { return exp_of(logits - base) * share; }
};

// What KL(from||to) sums, of one token
static inline double relative_entropy(double log_from, double log_to) {
    const double gap = log_to - log_from, from = ::exp(log_from);
    return ::fabs(gap) <= 1.0 ? from * (::expm1(gap) - gap) : ::exp(log_to) - from - from * gap;
}

// log((p + q) / 2)
static inline double log_mixture(double log_p, double log_q) {
    const double most = log_p > log_q ? log_p : log_q;
    return most + ::log1p(0.5 * ::expm1(-::fabs(log_p - log_q)));
}

// from * (expm1(gap) - gap) >= 0, gap = log to - log from: what KL(from||to) sums
static inline Floats relative_entropy(Floats from, Floats to, Floats gap) {
    const Floats near = from * expm1_excess(clamp_near(gap));
    // where |gap| is large, expm1 may overflow against a probability that is 0
    const Floats far = larger(zero(), (to - from) - from * gap);
    return select(at_most(size_of(gap), all(NEAR)), near, far);
}

// log m - log p and log m - log q, m = (p + q) / 2: of gap = log p - log q, both exact where the two are close
static inline void above_mixture(Floats gap, Floats& above_p, Floats& above_q) {
    const Floats size = size_of(gap);
    const Floats smaller_side = log1p_of(expm1_of(zero() - size) * all(0.5f));  // from the larger probability
    const Floats larger_side = size + smaller_side;
    const Mask policy_less = at_most(gap, zero());
    above_p = select(policy_less, larger_side, smaller_side);
    above_q = select(policy_less, smaller_side, larger_side);
}

constexpr float NO_TOKEN = -1e30f;  // a logit that is not there: probability 0 on both sides, and a finite gap

// A block of logits, without the label's
static inline const float* logits_or_copy(const float* row, std::int64_t start, int count,
                                          const FastforgetCommon& common, std::int64_t label, Block& copy) {
    const bool has_label = label >= start && label < start + count;
    const float* found = has_label ? nullptr : logits_in_place(row, start, count, common);
    if (found != nullptr) return found;
    load_logits(row, start, count, common, NO_TOKEN, copy);
    if (has_label) copy.at[label - start] = NO_TOKEN;
    return copy.at;
}

template <int KIND>
static void paired_row_of(const FastforgetPairedRows& arguments, std::int64_t row) {
    const FastforgetCommon& common = arguments.common;
    const float* policy = arguments.policy + row * arguments.policy_stride;
    const float* reference = arguments.reference + row * arguments.reference_stride;
    float* out = arguments.out == nullptr ? nullptr : arguments.out + row * arguments.out_stride;
    const std::int64_t label = arguments.labels == nullptr || arguments.labels[row] < 0 ? -1 : arguments.labels[row];
    const float label_p = label < 0 ? -INFINITY : logit_at(policy, label, common);
    const float label_q = label < 0 ? -INFINITY : logit_at(reference, label, common) + arguments.label_shift;
    const Softmax softmax_p(scan_row(policy, common, label, false), label_p);
    const Softmax softmax_q(scan_row(reference, common, label, false), label_q);
    const bool far = !(::fabs(softmax_p.lse - softmax_q.lse) <= 1.0);
    const Floats centre_p = far ? softmax_p.base : zero(), centre_q = far ? softmax_q.base : zero();
    const double apart = far ? softmax_p.log_total - softmax_q.log_total : softmax_p.lse - softmax_q.lse;
    const Floats shift = all(static_cast<float>(apart));
    const auto log_ratio = [=](Floats z_p, Floats z_q) { return ((z_p - centre_p) - (z_q - centre_q)) - shift; };
    const Floats near = all(NEAR);
    const bool capped = common.softcap > 0.0f;
    Block block_p, block_q;
    double first = 0.0, second = 0.0;  // forward KL; reverse KL; KL(p||m) and KL(q||m)
    double written = 0.0;  // the sum of the row's entries, before the softcap's slope
    if (label >= 0) {
        const double log_p = softmax_p.label_log_prob, log_q = softmax_q.label_log_prob;
        const double log_m = log_mixture(log_p, log_q);
        first = relative_entropy(KIND == 0 ? log_q : log_p, KIND == 0 ? log_p : KIND == 1 ? log_q : log_m);
        second = KIND == 2 ? relative_entropy(log_q, log_m) : 0.0;
    }
    const auto close_row = [&] {
        if (label >= 0) out[label] = static_cast<float>(-written) * softcap_slope(label_p, common.softcap);
    };
    for (std::int64_t start = 0; start < common.vocabulary; start += BLOCK) {
        const int count = length_of_block(start, common.vocabulary);
        const float* from_p = logits_or_copy(policy, start, count, common, label, block_p);
        const float* from_q = logits_or_copy(reference, start, count, common, label, block_q);
        float* const to = from_p == block_p.at || out == nullptr ? block_p.at : out + start;
        Floats sum = zero(), other_sum = zero(), entries = zero();
        for (int i = 0; i < whole_vectors(count); i += Floats::lanes) {
            const Floats z_p = load(from_p + i), z_q = load(from_q + i);
            const Floats gap = log_ratio(z_p, z_q);
            if (KIND == 0) {
                const Floats q = softmax_q.of(z_q), close = clamp_near(gap), excess = expm1_excess(close);
                const Mask is_near = at_most(size_of(gap), near);
                Floats value = q * excess, gradient = q * (close + excess);
                if (!everywhere(is_near)) {  // as it mostly is, with a reference that is an earlier self
                    const Floats difference = softmax_p.of(z_p) - q;
                    value = select(is_near, value, larger(zero(), difference - q * gap));
                    gradient = select(is_near, gradient, difference);
                }
                sum = sum + value;
                entries = entries + gradient;
                if (capped) gradient = gradient * softcap_slope(z_p, common.softcap);
                if (out != nullptr) store(to + i, gradient);
                continue;
            }
            const Floats p = softmax_p.of(z_p), q = softmax_q.of(z_q);
            if (KIND == 1) {
                sum = sum + relative_entropy(p, q, zero() - gap);
            } else {
                Floats above_p, above_q;
                above_mixture(gap, above_p, above_q);
                const Floats mixture = (p + q) * all(0.5f);
                sum = sum + relative_entropy(p, mixture, above_p);
                other_sum = other_sum + relative_entropy(q, mixture, above_q);
            }
        }
        first += sum_of(sum);
        second += sum_of(other_sum);
        written += sum_of(entries);
        if (KIND == 0 && out != nullptr && to == block_p.at) write_block(block_p, count, out + start);
    }
    arguments.values[row] = static_cast<float>(KIND == 2 ? 0.5 * (first + second) : first);
    if (KIND == 0 && out != nullptr) close_row();
    if (KIND == 0 || out == nullptr) return;
    const Floats value = all(static_cast<float>(first));
    for (std::int64_t start = 0; start < common.vocabulary; start += BLOCK) {
        const int count = length_of_block(start, common.vocabulary);
        const float* from_p = logits_or_copy(policy, start, count, common, label, block_p);
        const float* from_q = logits_or_copy(reference, start, count, common, label, block_q);
        float* const to = from_p == block_p.at ? block_p.at : out + start;
        Floats entries = zero();
        for (int i = 0; i < whole_vectors(count); i += Floats::lanes) {
            const Floats z_p = load(from_p + i);
            const Floats gap = log_ratio(z_p, load(from_q + i));
            const Floats p = softmax_p.of(z_p);
            Floats gradient;
            if (KIND == 1) {
                gradient = p * (gap - value);
            } else {
                Floats above_p, above_q;
                above_mixture(gap, above_p, above_q);
                gradient = p * all(-0.5f) * (above_p + value);
            }
            entries = entries + gradient;
            if (capped) gradient = gradient * softcap_slope(z_p, common.softcap);
            store(to + i, gradient);
        }
        written += sum_of(entries);
        if (to == block_p.at) write_block(block_p, count, out + start);
    }
    close_row();
}

static void paired_row(const FastforgetPairedRows& arguments, std::int64_t row) {
    switch (arguments.kind) {
        case 0: return paired_row_of<0>(arguments, row);
        case 1: return paired_row_of<1>(arguments, row);
        default: return paired_row_of<2>(arguments, row);
    }
}
