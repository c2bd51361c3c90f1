// The label row pass over one tile of vocabulary, between the two products with the head's rows of that tile.
//
// The second product takes weights e^(z - top) whose total is not known yet, as attention kernels do: sum_v e^(z_v - top)
// W_v is divided by the total after the last tile, and multiplied with e^(old top - new top) where the top rises. The
// label's weight is left out (its row of the head comes in at the end, with a factor of its own), so nothing cancels on a
// memorised token. A tile's row lies in a first or second-level cache between its two
// readings, where tiles are as gemm.py makes them.

static inline void multiply_row(float* row, std::int64_t width, float factor) {
    std::int64_t i = 0;
    for (; i + Floats::lanes <= width; i += Floats::lanes) store(row + i, load(row + i) * all(factor));
    for (; i < width; ++i) row[i] *= factor;
}

// Whole vectors of logits in place of the products, with -infinity after the last and at the label; the new top
static inline float finish_tile(float* tile, const FastforgetCommon& common, std::int64_t label,
                                std::int64_t first_column, bool moments, FastforgetLabelState& found) {
    const bool plain = common.scale == 1.0f && common.bias == nullptr && !(common.softcap > 0.0f);
    float top = found.top;
    Block buffer;
    for (std::int64_t start = 0; start < common.vocabulary; start += BLOCK) {
        const int count = length_of_block(start, common.vocabulary), end = whole_vectors(count);
        float* const block = tile + start;
        if (!plain) {
            load_logits(tile, start, count, common, 0.0f, buffer);
            for (int i = 0; i < end; i += Floats::lanes) store(block + i, load(buffer.at + i));
        }
        for (int i = count; i < end; ++i) block[i] = 0.0f;
        if (moments) found.plain += sum_of_block(block, count);
        for (int i = count; i < end; ++i) block[i] = -INFINITY;
        if (moments) look_for_best(block, count, first_column + start, found);
        if (label >= start && label < start + count) {
            found.label_logit = block[label - start];
            block[label - start] = -INFINITY;
        }
        const float block_top = largest_of_block(block, count);
        if (block_top > top) top = block_top;
    }
    return top;
}

static void label_tile(const FastforgetLabelTile& arguments, std::int64_t row) {
    FastforgetCommon common = arguments.common;
    if (common.bias != nullptr) common.bias += arguments.first_column;
    FastforgetLabelState& found = arguments.states[row];
    if (arguments.first_column == 0) found = FastforgetLabelState{};
    float* const tile = arguments.tile + row * arguments.tile_stride;
    const std::int64_t label = arguments.labels[row] - arguments.first_column;
    const bool moments = arguments.moments != 0, capped = common.softcap > 0.0f;
    const float top = finish_tile(tile, common, label, arguments.first_column, moments, found);
    double fade = 1.0;
    Block weights;
    for (std::int64_t start = 0; start < common.vocabulary; start += BLOCK) {
        const int count = length_of_block(start, common.vocabulary), end = whole_vectors(count);
        float* const block = tile + start;
        const bool apart = moments || (capped && arguments.write);  // the logits are needed after their weights
        float* const to = apart ? weights.at : arguments.write ? block : nullptr;
        fade *= add_block(block, count, top, moments, to, reinterpret_cast<const char*>(block + BLOCK), found);
        if (!apart || !arguments.write) continue;
        if (capped) {
            for (int i = 0; i < end; i += Floats::lanes) {
                store(block + i, load(weights.at + i) * softcap_slope(load(block + i), common.softcap));
            }
            if (label >= start && label < start + count) block[label - start] = 0.0f;  // 0 times infinity
        } else {
            for (int i = 0; i < end; i += Floats::lanes) store(block + i, load(weights.at + i));
        }
    }
    if (arguments.grad != nullptr && fade != 1.0) {
        multiply_row(arguments.grad + row * arguments.grad_stride, arguments.width, static_cast<float>(fade));
    }
}

static void label_end(const FastforgetLabelEnd& arguments, std::int64_t row) {
    const FastforgetLabelState& found = arguments.states[row];
    store_fields(arguments.fields, arguments.argmax, arguments.common, row, found, 1.0f);
    if (arguments.grad == nullptr) return;
    const float factor = share_of(found) * arguments.common.scale;
    multiply_row(arguments.grad + row * arguments.grad_stride, arguments.width, factor);
}
