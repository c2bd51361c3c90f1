// The gradient pass: one row over the logits for any mix of upstream gradients; protocol.py has the formula.

static void gradient_tile(const FastforgetGradientTile& arguments, std::int64_t row) {
    const FastforgetTile& tile = arguments.tile;
    const bool capped = tile.softcap > 0.0f, along_too = arguments.projected.data != nullptr;
    const Logits logits(tile, arguments.product, row, arguments.labels[row]);
    const Written written(tile, arguments.rows, row, false);
    const std::int64_t best = arguments.argmax[row] - tile.first;
    float given[12];
    for (int k = 0; k < 12; ++k) given[k] = arguments.coefficients[k * tile.row_count + row];
    const float label_probability = given[3], label_entry = given[8], max_logit = given[9], projected_mean = given[11];
    const Floats top = all(given[0]), share = all(given[1]), others = all(given[2]), for_lse = all(given[4]);
    const Floats for_entropy = all(given[5]), offset_mean = all(given[6]), for_unit = all(given[7]);
    const Floats mean = all(given[10]), along_mean = all(projected_mean);
    Block copy, along, values;
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        const int count = length_of_block(start, tile.columns);
        float* const block = logits.block(start, count, copy);
        const bool has_label = logits.has_label(start, count), has_best = best >= start && best < start + count;
        const float label_slope = has_label ? softcap_slope(block[logits.label - start], tile.softcap) : 1.0f;
        const float best_slope = has_best ? softcap_slope(block[best - start], tile.softcap) : 1.0f;
        logits.hide(block, start, count);
        if (along_too) {
            const FastforgetRows& projected = arguments.projected;
            read_rows(projected, row * projected.stride + start, count, tile.scale, along.at);
        }
        float* const out = written.block(start, count, values);
        for (int i = 0; i < whole_vectors(count); i += Floats::lanes) {
            const Floats z = load(block + i), offset = z - top;
            const Floats unit = exp_of(offset) * share;
            // a logit of minus infinity has a weight of 0, which infinity would make NaN
            Floats factor = for_lse - for_entropy * (larger(all(-200.0f), offset) - offset_mean);
            if (along_too) factor = factor + (load(along.at + i) - along_mean);
            Floats gradient = unit * (others * factor + for_unit) + mean;
            if (capped) gradient = gradient * softcap_slope(z, tile.softcap);
            store(out + i, gradient);
        }
        if (has_label) {
            double entry = label_entry;
            if (along_too) entry += static_cast<double>(label_probability) * (along.at[logits.label - start] - projected_mean);
            out[logits.label - start] = static_cast<float>((entry + given[10]) * label_slope);
        }
        if (has_best) out[best - start] += max_logit * best_slope;
        written.finish(out, start, count, values);
    }
}
