// The label row pass: every statistic of one row, then the row overwritten with softmax over the other tokens.
//
// Everything is centred on the largest of the *other* logits, so that log p_y and log(1 - p_y) both keep their digits, at
// p_y = 1e-12 as at 1 - p_y = 1e-9. Sums are of floats inside a block and of doubles between blocks. The row is read
// twice, the second time from the second-level cache, and written once.

// The mean of z - base and the deviations from it of one block, by Chan's formula into those so far.
static inline void add_moments(const float* block, const float* weights, int count, float base, double block_total,
                               double fade, FastforgetLabelState& found) {
    const Floats shift = all(base), lowest = all(-200.0f);  // there the weight is 0: 0 times infinity would be NaN
    const int end = whole_vectors(count);
    Floats sum = zero();
    for (int i = 0; i < end; i += Floats::lanes) {
        sum = multiply_add(load(weights + i), larger(lowest, load(block + i) - shift), sum);
    }
    const double block_mean = block_total > 0.0 ? sum_of(sum) / block_total : 0.0;
    const Floats middle = all(static_cast<float>(block_mean));
    Floats squares = zero();
    for (int i = 0; i < end; i += Floats::lanes) {
        const Floats gap = larger(lowest, load(block + i) - shift) - middle;
        squares = multiply_add(load(weights + i) * gap, gap, squares);
    }
    const double moved = found.top == -INFINITY ? 0.0 : static_cast<double>(found.top) - base;
    const double mean = found.mean + moved;
    const double share = found.total + block_total > 0.0 ? block_total / (found.total + block_total) : 0.0;
    const double gap = block_mean - mean;
    found.mean = mean + gap * share;
    found.deviations = found.deviations * fade + sum_of(squares) + gap * gap * found.total * share;
}

// Adds a block of logits of other tokens, none above `top`, which is not below the largest so far. What was found so far
// is multiplied with the number returned. The weights e^(z - top) go to `weights`, which may be the block itself: with
// `moments` always, else where it is not null.
static inline double add_block(const float* block, int count, float top, bool moments, float* weights,
                               const char* next, FastforgetLabelState& found) {
    const float base = finite_or_zero(top);
    const double fade = top > found.top ? ::exp(static_cast<double>(found.top) - base) : 1.0;
    const double total = weights != nullptr ? weigh_block<true>(block, count, base, weights, next)
                                            : weigh_block<false>(block, count, base, nullptr, next);
    found.total *= fade;
    if (moments) add_moments(block, weights, count, base, total, fade, found);
    found.total += total;
    found.top = top;
    return fade;
}

// The largest of all tokens' logits, the first of them, in a block that begins at `start`
static inline void look_for_best(const float* block, int count, std::int64_t start, FastforgetLabelState& found) {
    const float best = largest_of_block(block, count);
    if (!(best > found.best)) return;
    int index = 0;
    while (block[index] != best) ++index;
    found.best = best;
    found.best_index = start + index;
}

template <class In>
static inline FastforgetLabelState scan_row(const In* row, const FastforgetCommon& common, std::int64_t label,
                                            bool moments) {
    FastforgetLabelState found;
    Block buffer, weights;
    for (std::int64_t start = 0; start < common.vocabulary; start += BLOCK) {
        const int count = length_of_block(start, common.vocabulary);
        const bool has_label = label >= start && label < start + count;
        const float* block = has_label ? nullptr : logits_in_place(row, start, count, common);
        if (block == nullptr) {
            load_logits(row, start, count, common, 0.0f, buffer);
            block = buffer.at;
        }
        if (moments) found.plain += sum_of_block(block, count);
        if (block == buffer.at) pad(buffer, count, -INFINITY);
        if (moments) look_for_best(block, count, start, found);
        if (has_label) buffer.at[label - start] = -INFINITY;
        const float block_top = largest_of_block(block, count);
        const char* const next = reinterpret_cast<const char*>(row + start) + sizeof(In) * BLOCK;
        const float top = block_top > found.top ? block_top : found.top;
        add_block(block, count, top, moments, moments ? weights.at : nullptr, next, found);
    }
    return found;
}

// A power of two in (x / 2, x], for x > 0; 1 for 0 and for what is not finite
static inline float power_of_two_below(double x) {
    if (!(x > 0.0 && x < 1e300)) return 1.0f;
    int exponent;
    ::frexp(x, &exponent);
    return static_cast<float>(::ldexp(1.0, exponent - 1));
}

static inline void store_fields(float* fields, std::int64_t* argmax, const FastforgetCommon& common, std::int64_t row,
                                const FastforgetLabelState& found, float row_scale) {
    const float label_logit = found.label_logit;
    const double log_total = ::log(found.total);  // -infinity where the vocabulary is one token
    const double top = finite_or_zero(found.top);
    const double gap = (label_logit - top) - log_total;
    const double logp = -softplus(-gap), log_not = -softplus(gap), others = top + log_total;
    float* out = fields + row;
    const std::int64_t step = common.row_count;
    out[0] = static_cast<float>(logp);
    out[step] = static_cast<float>((label_logit > others ? label_logit : others) + ::log1p(::exp(-::fabs(gap))));
    out[2 * step] = label_logit;
    out[3 * step] = static_cast<float>(log_not);
    if (argmax != nullptr) {
        const double p_label = ::exp(logp), p_others = ::exp(log_not);
        const double mean_label = p_label > 0.0 ? logp : 0.0;
        const double mean_others = p_others > 0.0 ? found.mean - log_total + log_not : 0.0;
        const double spread = found.total > 0.0 ? found.deviations / found.total : 0.0;
        const double mean = p_label * mean_label + p_others * mean_others;
        const double from_label = mean_label - mean, from_others = mean_others - mean;
        const bool known = found.total == found.total && label_logit == label_logit;  // a largest number passes over NaN
        const double unknown = found.total + label_logit;
        out[4 * step] = known ? found.best : static_cast<float>(unknown);
        out[5 * step] = static_cast<float>(found.plain / static_cast<double>(common.vocabulary));
        out[6 * step] = static_cast<float>(known ? mean : unknown);
        out[7 * step] = static_cast<float>(
            known ? p_label * from_label * from_label + p_others * (spread + from_others * from_others) : unknown);
        out[11 * step] = found.total == 0.0 ? 0.0f : static_cast<float>(log_total - found.mean);
        argmax[row] = found.best_index;
    }
    out[8 * step] = softcap_slope(label_logit, common.softcap);
    out[9 * step] = row_scale;
    out[10 * step] = static_cast<float>(others);
}

// What a weight e^(z - top) is multiplied with to be a probability among the others; a vocabulary of one token has none
static inline float share_of(const FastforgetLabelState& found) {
    return found.total > 0.0 || found.total != found.total ? static_cast<float>(1.0 / found.total) : 1.0f;
}

// Where a part of the written row goes without a copy
template <class Out>
static inline float* row_in_place(Out*, std::int64_t) {
    return nullptr;
}
static inline float* row_in_place(float* out, std::int64_t start) { return out + start; }

// Softmax over the other tokens, times the softcap's slope, and the mass of each tile
template <class In, class Out>
static inline void write_label_row(const FastforgetCommon& common, const In* logits, Out* out, float* masses,
                                   std::int64_t label, float base, float share, float row_scale) {
    const Floats shift = all(base), factor = all(share);
    Block buffer;
    for (std::int64_t start = 0; start < common.vocabulary; start += BLOCK) {
        const int count = length_of_block(start, common.vocabulary);
        const int end = whole_vectors(count);
        const float* block = logits_in_place(logits, start, count, common);
        float* to = block == nullptr ? nullptr : row_in_place(out, start);  // as the row's end is one of whole vectors too
        const bool written = to != nullptr;
        if (!written) to = buffer.at;
        if (block == nullptr) {
            load_logits(logits, start, count, common, 0.0f, buffer);
            block = buffer.at;
        }
        if (common.softcap > 0.0f) {
            for (int i = 0; i < end; i += Floats::lanes) {
                const Floats z = load(block + i);
                store(to + i, exp_of(z - shift) * factor * softcap_slope(z, common.softcap));
            }
        } else {
            for (int i = 0; i < end; i += Floats::lanes) store(to + i, exp_of(load(block + i) - shift) * factor);
        }
        if (!written) pad(buffer, count, 0.0f);
        if (label >= start && label < start + count) to[label - start] = 0.0f;
        if (masses != nullptr) {
            for (int first = 0; first < count; first += FASTFORGET_TILE) {
                Floats sum = zero();
                for (int i = first; i < first + FASTFORGET_TILE && i < end; i += Floats::lanes) sum = sum + load(to + i);
                *masses++ = sum_of(sum);
            }
        }
        if (written) continue;
        if (row_scale != 1.0f) {
            for (int i = 0; i < end; i += Floats::lanes) store(to + i, load(to + i) * all(row_scale));
        }
        write_block(buffer, count, out + start);
    }
}

template <class In, class Out>
static void label_row_of(const FastforgetLabelRows& arguments, std::int64_t row) {
    const FastforgetCommon& common = arguments.common;
    const In* logits = static_cast<const In*>(arguments.logits) + row * arguments.logits_stride;
    const std::int64_t label = arguments.labels[row];
    FastforgetLabelState found = scan_row(logits, common, label, arguments.argmax != nullptr);
    found.label_logit = logit_at(logits, label, common);
    const bool scaled = arguments.out != nullptr && arguments.out_dtype == FASTFORGET_FLOAT16;
    // the largest entry, 1 / total, near 2^13: most of a float16 row would flush to zero otherwise
    const float row_scale = scaled ? 8192.0f * power_of_two_below(found.total) : 1.0f;
    store_fields(arguments.fields, arguments.argmax, common, row, found, row_scale);
    if (arguments.out == nullptr) return;
    const std::int64_t tiles = (common.vocabulary + FASTFORGET_TILE - 1) / FASTFORGET_TILE;
    write_label_row(common, logits, static_cast<Out*>(arguments.out) + row * arguments.out_stride,
                    arguments.masses == nullptr ? nullptr : arguments.masses + row * tiles, label,
                    finite_or_zero(found.top), share_of(found), row_scale);
}

template <class In>
static void label_row_into(const FastforgetLabelRows& arguments, std::int64_t row) {
    switch (arguments.out_dtype) {
        case FASTFORGET_FLOAT32: return label_row_of<In, float>(arguments, row);
        case FASTFORGET_BFLOAT16: return label_row_of<In, BFloat16>(arguments, row);
        default: return label_row_of<In, Float16>(arguments, row);
    }
}

static void label_row(const FastforgetLabelRows& arguments, std::int64_t row) {
    switch (arguments.logits_dtype) {
        case FASTFORGET_FLOAT32: return label_row_into<float>(arguments, row);
        case FASTFORGET_BFLOAT16: return label_row_into<BFloat16>(arguments, row);
        default: return label_row_into<Float16>(arguments, row);
    }
}
