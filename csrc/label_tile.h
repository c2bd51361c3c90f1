// The label pass: everything is relative to a lazy top of the *other* logits, so that log p_y and log(1 - p_y) both keep
// their digits, at p_y = 1e-12 as at 1 - p_y = 1e-9. Sums are of floats inside a block and of doubles between blocks.
//
// One look at each block: where the top moves inside a tile, which is rare, what the tile's earlier blocks have written
// is multiplied like everything else that was accumulated.

enum LabelName { TOP, TOTAL, TOTAL_REST, LABEL_LOGIT, MEAN, DEVIATIONS, SUM, SUM_REST, BEST, BEST_INDEX, LABEL_NAMES };
constexpr int BASIC_NAMES = 4;
using LabelSums = Accumulators<LABEL_NAMES>;

// The mean of z - base and the deviations from it of one block, by Chan's formula into those so far.
static inline void add_moments(const float* block, const float* weights, int count, float base, double block_total,
                               LabelSums& found) {
    const Floats shift = all(base), lowest = all(-200.0f);  // there the weight is 0: 0 times infinity would be NaN
    const int end = whole_vectors(count);
    Floats sum = zero();
    for (int i = 0; i < end; i += Floats::lanes) {
        sum = multiply_add(load(weights + i), larger(lowest, load(block + i) - shift), sum);
    }
    const double block_mean = block_total == 0.0 ? 0.0 : sum_of(sum) / block_total;
    const Floats middle = all(static_cast<float>(block_mean));
    Floats squares = zero();
    for (int i = 0; i < end; i += Floats::lanes) {
        const Floats gap = larger(lowest, load(block + i) - shift) - middle;
        squares = multiply_add(load(weights + i) * gap, gap, squares);
    }
    const double total = found[TOTAL] + block_total, share = total == 0.0 ? 0.0 : block_total / total;
    const double gap = block_mean - found[MEAN];
    found[MEAN] += gap * share;
    found[DEVIATIONS] += sum_of(squares) + gap * gap * found[TOTAL] * share;
}

// Move the top to `top`; returns what was accumulated is multiplied with.
static inline double move_top(float top, LabelSums& found) {
    const double fade = ::exp(found[TOP] - top);
    if (found[TOP] > -INFINITY) found[MEAN] += found[TOP] - top;
    found[TOTAL] *= fade;
    found[DEVIATIONS] *= fade;
    found[TOP] = top;
    return fade;
}

static void label_tile(const FastforgetLabelTile& arguments, std::int64_t row) {
    const FastforgetTile& tile = arguments.tile;
    const bool moments = arguments.moments != 0, capped = tile.softcap > 0.0f;
    const int names = moments ? LABEL_NAMES : BASIC_NAMES;
    double* const accumulators = arguments.accumulators + row;
    LabelSums found{};
    if (tile.first == 0) {
        found[TOP] = found[LABEL_LOGIT] = found[BEST] = -INFINITY;
    } else {
        found.read(accumulators, arguments.accumulators_stride, names);
    }
    const Logits logits(tile, arguments.product, arguments.product_stride, arguments.product_dtype, row,
                        arguments.labels[row] - tile.first);
    float* const out = arguments.rows == nullptr ? nullptr : arguments.rows + row * arguments.rows_stride;
    double fade = 1.0;
    Block copy, weights;
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        const int count = length_of_block(start, tile.columns), end = whole_vectors(count);
        const bool has_label = logits.has_label(start, count);
        const std::int64_t label = logits.label - start;
        const float* block = logits.in_place(start, count);
        if (block == nullptr) {
            logits.read(start, count, 0.0f, copy);
            block = copy.at;
        }
        if (moments) found[SUM] += sum_of_block(block, count);
        if (block == copy.at) pad(copy, count, -INFINITY);
        if (has_label) {
            found[LABEL_LOGIT] = copy.at[label];
            copy.at[label] = -INFINITY;
        }
        const float largest = largest_of_block(block, count);
        if (moments && largest > found[BEST]) {
            int index = 0;
            while (block[index] != largest) ++index;
            found[BEST] = largest;
            found[BEST_INDEX] = static_cast<double>(tile.first + start + index);
        }
        if (largest > found[TOP] + LAZY) {
            const double factor = move_top(largest, found);
            fade *= factor;
            if (out != nullptr) multiply_row(out, start, static_cast<float>(factor));
        }
        const float base = finite_or_zero(static_cast<float>(found[TOP]));
        // straight into the row, where the logits are not needed after their weights and nothing is left over
        const bool straight = out != nullptr && !moments && !capped && count == end;
        float* const to = straight ? out + start : weights.at;
        const char* const next = logits.address(start + BLOCK);
        const double total = moments || out != nullptr ? weigh_block<true>(block, count, base, to, next)
                                                       : weigh_block<false>(block, count, base, nullptr, next);
        if (moments) add_moments(block, to, count, base, total, found);
        found[TOTAL] += total;
        if (straight || out == nullptr) continue;
        if (capped) {
            for (int i = 0; i < end; i += Floats::lanes) {
                store(to + i, load(to + i) * softcap_slope(load(block + i), tile.softcap));
            }
            if (has_label) to[label] = 0.0f;  // 0 times infinity
        }
        write_block(weights, count, out + start);
    }
    found.write(accumulators, arguments.accumulators_stride, names);
    if (arguments.grad != nullptr && tile.first != 0 && fade != 1.0) {
        multiply_row(arguments.grad + row * arguments.grad_stride, arguments.width, static_cast<float>(fade));
    }
}
