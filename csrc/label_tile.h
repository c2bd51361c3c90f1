// The label pass: weights e^(z - top) of the other tokens than the label, their sum, and moments of z.
//
// The label is left out everywhere, so that log p_y and log(1 - p_y) both keep their digits, at p_y = 1e-12 as at
// 1 - p_y = 1e-9. Sums are of floats inside a block and of doubles between blocks. A block is read a second time from the
// first-level cache; the top moves between blocks, and what the tile has written so far is then brought to it.

struct LabelState {
    double top = -INFINITY;
    double total = 0.0;
    double label_logit = -INFINITY;
    double mean = 0.0;
    double deviations = 0.0;
    double sum = 0.0;
    double best = -INFINITY;
    double best_index = 0.0;

    void load_from(const double* from, std::int64_t step, bool moments) {
        top = from[0];
        total = from[step] + from[2 * step];
        label_logit = from[3 * step];
        if (!moments) return;
        mean = from[4 * step];
        deviations = from[5 * step];
        sum = from[6 * step] + from[7 * step];
        best = from[8 * step];
        best_index = from[9 * step];
    }

    void store_to(double* to, std::int64_t step, bool moments) const {
        const double values[] = {top, total, 0.0, label_logit, mean, deviations, sum, 0.0, best, best_index};
        for (int k = 0; k < (moments ? 10 : 4); ++k) to[k * step] = values[k];
    }

    // Moves the top to `largest` where that lies more than `lazy` above it; the factor of what was summed before. Where
    // there was no top nothing was summed.
    double move_top(double largest, double lazy) {
        if (!(largest > top + lazy)) return 1.0;
        const bool any = top != -INFINITY;
        const double moved = any ? top - largest : 0.0, fade = any ? ::exp(moved) : 1.0;
        total *= fade;
        mean += moved;
        deviations *= fade;
        top = largest;
        return fade;
    }

    // The mean of z - top and the deviations from it of one block, by Chan's formula into those so far.
    void add_moments(const float* block, const float* weights, int count, double block_total) {
        const Floats base = all(static_cast<float>(finite_or_zero(top)));
        const Floats lowest = all(-200.0f);  // there the weight is 0: 0 times infinity would be NaN
        const int end = whole_vectors(count);
        Floats products = zero(), squares = zero();
        for (int i = 0; i < end; i += Floats::lanes) {
            products = multiply_add(load(weights + i), larger(lowest, load(block + i) - base), products);
        }
        const double block_mean = block_total == 0.0 ? 0.0 : sum_of(products) / block_total;
        const Floats middle = all(static_cast<float>(block_mean));
        for (int i = 0; i < end; i += Floats::lanes) {
            const Floats gap = larger(lowest, load(block + i) - base) - middle;
            squares = multiply_add(load(weights + i) * gap, gap, squares);
        }
        const double share = block_total == 0.0 ? 0.0 : block_total / (total + block_total);
        const double gap = block_mean - mean;
        mean += gap * share;
        deviations += sum_of(squares) + gap * gap * total * share;
    }

    // The largest logit, the first of several, of a block that begins at token `start`
    void look_for_best(const float* block, float largest, std::int64_t start) {
        if (!(largest > best)) return;
        int index = 0;
        while (block[index] != largest) ++index;
        best = largest;
        best_index = static_cast<double>(start + index);
    }
};

static void label_tile(const FastforgetLabelTile& arguments, std::int64_t row) {
    const FastforgetTile& tile = arguments.tile;
    const Logits logits(tile, arguments.product, row, arguments.labels[row]);
    const Written written(tile, arguments.rows, row, true);
    const bool moments = arguments.moments != 0, capped = tile.softcap > 0.0f;
    double* const accumulators = arguments.accumulators + row;
    LabelState state;
    if (tile.first != 0) state.load_from(accumulators, arguments.accumulators_stride, moments);
    Block copy, weights;
    double fade = 1.0;
    if (written.is_narrow()) {  // what is written would be rounded again where the top moved inside the tile
        float largest = -INFINITY;
        for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
            const int count = length_of_block(start, tile.columns);
            float* const block = logits.block(start, count, copy);
            logits.hide(block, start, count);
            const float block_largest = largest_of_block(block, count);
            if (block_largest > largest) largest = block_largest;
        }
        fade = state.move_top(largest, written.is_float16() ? 0.0 : LAZY);
    }
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        const int count = length_of_block(start, tile.columns), end = whole_vectors(count);
        float* const block = logits.block(start, count, copy);
        logits.look_for_label(block, start, count, state.label_logit);
        if (moments) {
            logits.fill_up(block, count, 0.0f);
            state.sum += sum_of_block(block, count);
        }
        logits.hide(block, start, count);
        const float largest = largest_of_block(block, count);
        if (moments) state.look_for_best(block, largest, tile.first + start);
        if (!written.is_narrow()) {
            const double moved = state.move_top(largest, LAZY);
            if (moved != 1.0 && arguments.rows.data != nullptr) {
                multiply_row(static_cast<float*>(arguments.rows.data) + written.offset, start, moved);
            }
            fade *= moved;
        }
        const float base = static_cast<float>(finite_or_zero(state.top));
        float* const out = written.block(start, count, weights);
        float* const to = moments || (capped && out != nullptr) ? weights.at : out;  // logits are needed after weights
        const double total = to != nullptr ? weigh_block<true>(block, count, base, to, block_after(block))
                                           : weigh_block<false>(block, count, base, nullptr, block_after(block));
        if (moments) state.add_moments(block, to, count, total);
        state.total += total;
        if (out == nullptr) continue;
        if (capped) {
            for (int i = 0; i < end; i += Floats::lanes) {
                store(out + i, load(to + i) * softcap_slope(load(block + i), tile.softcap));
            }
        } else if (to != out) {
            for (int i = 0; i < end; i += Floats::lanes) store(out + i, load(to + i));
        }
        written.close(out, start, count, weights, logits.label);
    }
    if (arguments.grad != nullptr && tile.first != 0 && fade != 1.0) {
        multiply_row(arguments.grad + row * arguments.grad_stride, arguments.width, fade);
    }
    state.store_to(accumulators, arguments.accumulators_stride, moments);
}
