// The gradient pass: one row over the logits for any mix of upstream gradients; protocol.py has the formula.

struct GradientCoefficients {
    float top, share, others_probability, label_probability, lse, entropy, offset_mean, unit, label_entry, max_logit;
    float logit_mean, projected_mean;
};

static void gradient_tile(const FastforgetTile& tile, std::int64_t number) {
    Row row(tile, 0, number, false);
    const FastforgetRows& projected = tile.products[1];
    const float softcap = tile.softcap;
    const bool along_too = projected.data != nullptr, capped = row.capped;
    const std::int64_t best = tile.argmax[number] < 0 ? -1 : tile.argmax[number] - tile.first;
    const auto given = given_of<GradientCoefficients>(tile, number);
    const Floats top = all(given.top), share = all(given.share), others = all(given.others_probability);
    const Floats lse = all(given.lse), entropy = all(given.entropy), offset_mean = all(given.offset_mean);
    const Floats for_unit = all(given.unit), mean = all(given.logit_mean), along_mean = all(given.projected_mean);
    Block along;
    double label_logit = 0.0;
    for (std::int64_t start = 0; start < tile.columns; start += BLOCK) {
        row.read(start, label_logit);
        const float best_slope = row.has(best) ? softcap_slope(row.z[best - start], softcap) : 1.0f;
        row.hide();
        if (along_too) read_rows(projected, number * projected.stride + start, row.count, tile.scale, along.at);
        const float* const logits = row.z;
        float* const out = row.open();
        const int end = row.end;
        for (int i = 0; i < end; i += LANES) {
            const Floats z = load(logits + i), offset = z - top;
            const Floats unit = exp_of(offset) * share;
            // a logit of minus infinity has a weight of 0, which infinity would make NaN
            Floats factor = lse - entropy * (larger(all(-200.0f), offset) - offset_mean);
            if (along_too) factor = factor + (load(along.at + i) - along_mean);
            Floats gradient = unit * (others * factor + for_unit) + mean;
            if (capped) gradient = gradient * softcap_slope(z, softcap);
            store(out + i, gradient);
        }
        if (row.has(row.label)) {
            const std::int64_t at = row.label - start;
            double entry = given.label_entry;
            if (along_too) {
                entry += static_cast<double>(given.label_probability) * (along.at[at] - given.projected_mean);
            }
            const float label_slope = softcap_slope(static_cast<float>(label_logit), softcap);
            out[at] = static_cast<float>((entry + given.logit_mean) * label_slope);
        }
        if (row.has(best)) out[best - start] += given.max_logit * best_slope;
        row.finish();
    }
}
