// The gradient row pass: one row over the logits for any mix of upstream gradients,
//
//     p (c_lse - c_entropy (z - E_p z) + r - E_p r) + c_unit (softmax over the others - onehot)
//       + c_label onehot(label) + c_max onehot(argmax) + c_mean / V            r = scale * projected

static void gradient_row(const FastforgetGradientRows& arguments, std::int64_t row) {
    const FastforgetCommon& common = arguments.common;
    const std::int64_t vocabulary = common.vocabulary, label = arguments.labels[row];
    const float* logits = arguments.logits + row * arguments.logits_stride;
    const float* projected =
        arguments.projected == nullptr ? nullptr : arguments.projected + row * arguments.projected_stride;
    float* out = arguments.out + row * arguments.out_stride;
    float coefficients[6];
    for (int k = 0; k < 6; ++k) coefficients[k] = arguments.coefficients[k * common.row_count + row];
    const float for_mean = static_cast<float>(coefficients[5] / static_cast<double>(vocabulary));

    // Over the others: the largest logit, the sum of weights, and weighted sums of z - top and of r.
    float top = -INFINITY;
    double total = 0.0, offset_sum = 0.0, projected_sum = 0.0;
    Block block, weights, along;
    for (std::int64_t start = 0; start < vocabulary; start += BLOCK) {
        const int count = length_of_block(start, vocabulary);
        load_logits(logits, start, count, common, -INFINITY, block);
        if (label >= start && label < start + count) block.at[label - start] = -INFINITY;
        const float block_top = largest_of_block(block.at, count);
        const float new_top = block_top > top ? block_top : top;
        const float base = finite_or_zero(new_top);
        const double fade = new_top > top ? ::exp(static_cast<double>(top) - base) : 1.0;
        const double moved = top == -INFINITY ? 0.0 : static_cast<double>(top) - base;
        const double block_total = weigh_block<true>(
            block.at, count, base, weights.at, reinterpret_cast<const char*>(logits + start + BLOCK));
        Floats offsets = zero(), products = zero();
        for (int i = 0; i < whole_vectors(count); i += Floats::lanes) {
            const Floats offset = larger(all(-200.0f), load(block.at + i) - all(base));  // not infinite times a weight 0
            offsets = multiply_add(load(weights.at + i), offset, offsets);
        }
        if (projected != nullptr) {
            read_block(projected + start, count, common.scale, along);
            for (int i = 0; i < whole_vectors(count); i += Floats::lanes) {
                products = multiply_add(load(weights.at + i), load(along.at + i), products);
            }
        }
        offset_sum = (offset_sum + moved * total) * fade + sum_of(offsets);
        projected_sum = projected_sum * fade + sum_of(products);
        total = total * fade + block_total;
        top = new_top;
    }
    const float base = finite_or_zero(top);
    const float label_logit = logit_at(logits, label, common);
    const double share = total > 0.0 || total != total ? 1.0 / total : 1.0;
    const double gap = (static_cast<double>(label_logit) - base) - ::log(total);
    const double p_label = ::exp(-softplus(-gap)), p_others = ::exp(-softplus(gap));
    // offsets from the largest logit of all: on a memorised token the others' largest lies far below it
    const float from_base = label_logit - base;
    const float over = from_base > 0.0f ? from_base : 0.0f, label_offset = from_base > 0.0f ? 0.0f : from_base;
    const double mean = p_others * (offset_sum * share - over) + p_label * label_offset;
    double projected_mean = 0.0;
    float projected_label = 0.0f;
    if (projected != nullptr) {
        projected_label = projected[label] * common.scale;
        projected_mean = p_others * projected_sum * share + p_label * projected_label;
    }

    const Floats shift = all(base), above = all(over), unit_share = all(static_cast<float>(share));
    const Floats others = all(static_cast<float>(p_others)), middle = all(static_cast<float>(mean));
    const Floats along_middle = all(static_cast<float>(projected_mean));
    const Floats for_lse = all(coefficients[0]), for_unit = all(coefficients[1]), for_entropy = all(coefficients[2]);
    const std::int64_t best = arguments.argmax == nullptr ? -1 : arguments.argmax[row];
    for (std::int64_t start = 0; start < vocabulary; start += BLOCK) {
        const int count = length_of_block(start, vocabulary);
        load_logits(logits, start, count, common, -INFINITY, block);
        if (projected != nullptr) read_block(projected + start, count, common.scale, along);
        float best_slope = 1.0f;  // of the token that argmax names
        if (best >= start && best < start + count) best_slope = softcap_slope(block.at[best - start], common.softcap);
        for (int i = 0; i < whole_vectors(count); i += Floats::lanes) {
            const Floats z = load(block.at + i);
            const Floats unit = exp_of(z - shift) * unit_share;
            const Floats offset = larger(all(-200.0f), z - shift);  // as above: a logit may be minus infinity
            Floats factor = for_lse - for_entropy * ((offset - above) - middle);
            if (projected != nullptr) factor = factor + (load(along.at + i) - along_middle);
            Floats gradient = unit * others * factor + for_unit * unit + all(for_mean);
            if (common.softcap > 0.0f) gradient = gradient * softcap_slope(z, common.softcap);
            store(block.at + i, gradient);
        }
        if (label >= start && label < start + count) {
            double factor = coefficients[0] - coefficients[2] * (label_offset - mean);
            if (projected != nullptr) factor += projected_label - projected_mean;
            const double gradient = p_label * factor - coefficients[1] + for_mean + coefficients[3];
            block.at[label - start] = static_cast<float>(gradient) * softcap_slope(label_logit, common.softcap);
        }
        if (best >= start && best < start + count) block.at[best - start] += coefficients[4] * best_slope;
        write_block(block, count, out + start);
    }
}
