// One hidden state against its anchor and the nearest of K centres.
//
// Distances are formed from differences, so that a state that is almost its anchor keeps its digits; the cosine distance
// is half the squared difference of the unit vectors.

// The sum of (a * factor_a - b * factor_b)^2; b null: of (a * factor_a)^2
template <class In>
static double squared_distance(const In* a, float factor_a, const float* b, float factor_b, std::int64_t width) {
    double total = 0.0;
    const Floats scale_a = all(factor_a), scale_b = all(factor_b);
    for (std::int64_t start = 0; start < width; start += BLOCK) {
        const std::int64_t end = start + length_of_block(start, width);
        Floats sums[2] = {zero(), zero()};
        std::int64_t i = start;
        for (int k = 0; i + LANES <= end; i += LANES, k = 1 - k) {
            Floats gap = load(a + i) * scale_a;
            if (b != nullptr) gap = gap - load(b + i) * scale_b;
            sums[k] = multiply_add(gap, gap, sums[k]);
        }
        float rest = 0.0f;
        for (; i < end; ++i) {
            const float gap = widened(a[i]) * factor_a - (b != nullptr ? b[i] * factor_b : 0.0f);
            rest += gap * gap;
        }
        total += sum_of(sums[0] + sums[1]) + rest;
    }
    return total;
}

// 1 / its length; 0 for a vector without a direction, of length 0 or one that no float holds; NaN where a number is infinite
template <class In>
static float unit_factor(const In* vector, std::int64_t width) {
    const double square = squared_distance<In>(vector, 1.0f, nullptr, 0.0f, width);
    if (square == INFINITY) return static_cast<float>(squared_distance<In>(vector, 0.0f, nullptr, 0.0f, width));
    return square == 0.0 ? 0.0f : static_cast<float>(1.0 / ::sqrt(square));
}

template <class In>
static void measure_state(const FastforgetStates& arguments, const In* state, std::int64_t row) {
    const std::int64_t width = arguments.width;
    const bool cosine = arguments.cosine != 0;
    const float factor = cosine ? unit_factor(state, width) : 1.0f;
    const auto distance_from = [&](const float* point, float point_factor) {
        if (factor == 0.0f || point_factor == 0.0f) return 1.0;
        const double square = squared_distance(state, factor, point, point_factor, width);
        return cosine ? 0.5 * square : ::sqrt(square);
    };
    if (arguments.anchor != nullptr) {
        const float* const anchor = arguments.anchor + row * arguments.anchor_stride;
        arguments.values[row] = static_cast<float>(distance_from(anchor, cosine ? unit_factor(anchor, width) : 1.0f));
    }
    if (arguments.centres == nullptr) return;
    double pull = INFINITY;
    std::int64_t nearest = 0;
    for (std::int64_t centre = 0; centre < arguments.centre_count; ++centre) {
        const float* const point = arguments.centres + centre * width;
        const bool directed = !cosine || squared_distance<float>(point, 1.0f, nullptr, 0.0f, width) != 0.0;
        const double distance = distance_from(point, directed ? 1.0f : 0.0f);
        if (distance >= pull || pull != pull) continue;  // a NaN is the smallest, as to torch's argmin
        pull = distance;
        nearest = centre;
    }
    arguments.values[arguments.values_stride + row] = static_cast<float>(pull);
    arguments.nearest[row] = nearest;
}

static void state_row(const FastforgetStates& arguments, std::int64_t row) {
    const FastforgetRows& states = arguments.states;
    const std::int64_t offset = row * states.stride;
    switch (states.dtype) {
        case FASTFORGET_FLOAT32: return measure_state(arguments, static_cast<const float*>(states.data) + offset, row);
        case FASTFORGET_BFLOAT16: return measure_state(arguments, static_cast<const BFloat16*>(states.data) + offset, row);
        default: return measure_state(arguments, static_cast<const Float16*>(states.data) + offset, row);
    }
}
