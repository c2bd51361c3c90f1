// The label pass: weights e^(z - top) of the other tokens than the label, their sum, and moments of z.
//
// The label is left out everywhere, so that log p_y and log(1 - p_y) both keep their digits, at p_y = 1e-12 as at
// 1 - p_y = 1e-9. Sums are of floats inside a block and of doubles between blocks. A block is read a second time from
// the first-level cache; the top moves between blocks, and what the tile has written so far is then brought to it.

struct LabelAccumulators {
    double top = -INFINITY, total = 0.0, total_rest = 0.0, label_logit = -INFINITY, mean = 0.0, deviations = 0.0;
    double sum = 0.0, sum_rest = 0.0, best = -INFINITY, best_index = 0.0;

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

    // The mean of z - top and the deviations from it of one block, by Chan's formula into those so far
    void add_moments(const Row& row, const float* weights, double block_total) {
        const Floats base = all(static_cast<float>(finite_or_zero(top)));
        const Floats lowest = all(-200.0f);  // there the weight is 0: 0 times infinity would be NaN
        const float* const z = row.z;
        Floats products = zero(), squares = zero();
        for (int i = 0; i < row.end; i += LANES) {
            products = multiply_add(load(weights + i), larger(lowest, load(z + i) - base), products);
        }
        const double block_mean = block_total == 0.0 ? 0.0 : sum_of(products) / block_total;
        const Floats middle = all(static_cast<float>(block_mean));
        for (int i = 0; i < row.end; i += LANES) {
            const Floats gap = larger(lowest, load(z + i) - base) - middle;
            squares = multiply_add(load(weights + i) * gap, gap, squares);
        }
        const double share = block_total == 0.0 ? 0.0 : block_total / (total + block_total);
        const double gap = block_mean - mean;
        mean += gap * share;
        deviations += sum_of(squares) + gap * gap * total * share;
    }

    // The first NaN, or the first of the largest logits, as torch's argmax; `largest` passes over NaN, a total does not
    void look_for_best(const Row& row, float largest, double block_total) {
        if (best != best) return;
        const float *const end = row.z + row.count, *at = end;
        if (block_total != block_total) at = std::find_if(static_cast<const float*>(row.z), end, is_nan);
        if (at == end) {
            if (!(largest > best)) return;
            at = std::find(static_cast<const float*>(row.z), end, largest);
        }
        best = *at;
        best_index = static_cast<double>(row.tile.first + row.start + (at - row.z));
    }
};

template <bool MOMENTS>
static void label_tile(const FastforgetTile& tile, std::int64_t number) {
    Row row(tile, 0, number, true);
    constexpr std::size_t kept = MOMENTS ? sizeof(LabelAccumulators) / sizeof(double) : BASIC_ACCUMULATORS;
    auto found = accumulators_of<LabelAccumulators>(tile, number, kept);
    Block weights;
    // a mean of offsets from a lazy top would lose its digits to their size
    const double lazy = MOMENTS || row.float16_writes ? 0.0 : LAZY;
    double fade = 1.0;
    const bool capped = row.capped;
    const float softcap = tile.softcap;
    if (row.narrow_writes) {  // what is written would be rounded again where the top moved inside the tile
        float largest = -INFINITY;
        for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
            row.read(start, found.label_logit);
            row.hide();
            const float block_largest = largest_of_block(row.z, row.end);
            if (block_largest > largest) largest = block_largest;
        }
        fade = found.move_top(largest, lazy);
    }
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        row.read(start, found.label_logit);
        if (MOMENTS) {
            row.fill_up(0.0f);
            found.sum += sum_of_block(row.z, row.end);
        }
        row.hide();
        const float largest = largest_of_block(row.z, row.end);
        if (!row.narrow_writes) {
            const double moved = found.move_top(largest, lazy);
            if (moved != 1.0 && row.writes) multiply_row(row.written_floats(), start, moved);
            fade *= moved;
        }
        float* const out = row.open();
        float* const to = MOMENTS || (capped && row.writes) ? weights.at : out;  // logits are needed after weights
        const double total = weigh_block(row.z, row.end, static_cast<float>(finite_or_zero(found.top)), to);
        if (MOMENTS) {
            found.look_for_best(row, largest, total);
            found.add_moments(row, to, total);
        }
        found.total += total;
        if (out != nullptr && to != out) {
            const float* const z = row.z;
            const int end = row.end;
            for (int i = 0; i < end; i += LANES) {
                const Floats slope = capped ? softcap_slope(load(z + i), softcap) : all(1.0f);
                store(out + i, load(to + i) * slope);
            }
        }
        row.close();
    }
    if (tile.grads[0].data != nullptr && fade != 1.0) {
        multiply_row(static_cast<float*>(tile.grads[0].data) + number * tile.grads[0].stride, tile.width, fade);
    }
    keep(found, tile, number, kept);
}
