// One hidden state against its anchor and the nearest of K centres.
//
// Distances are formed from differences, so that a state that is almost its anchor keeps its digits; the cosine distance
// is half the squared difference of the unit vectors.

// The sum of (a * factor_a - b * factor_b)^2; b null: of (a * factor_a)^2
template <class In>
static double squared_distance(const In* a, double factor_a, const float* b, double factor_b, std::int64_t width) {
    double total = 0.0;
    float last_a[Floats::lanes], last_b[Floats::lanes] = {};
    const Floats scale_a = all(static_cast<float>(factor_a)), scale_b = all(static_cast<float>(factor_b));
    for (std::int64_t start = 0; start < width; start += BLOCK) {
        const int count = length_of_block(start, width), whole = count / Floats::lanes * Floats::lanes;
        Floats sums[2] = {zero(), zero()};
        int i = 0;
        for (; i < whole; i += Floats::lanes) {
            Floats gap = load(a + start + i) * scale_a;
            if (b != nullptr) gap = gap - load(b + start + i) * scale_b;
            sums[i / Floats::lanes % 2] = multiply_add(gap, gap, sums[i / Floats::lanes % 2]);
        }
        if (whole < count) {
            read_block(a + start + whole, count - whole, 1.0f, last_a);
            if (b != nullptr) read_block(b + start + whole, count - whole, 1.0f, last_b);
            const Floats gap = load(last_a) * scale_a - load(last_b) * scale_b;
            sums[0] = multiply_add(gap, gap, sums[0]);
        }
        total += sum_of(sums[0] + sums[1]);
    }
    return total;
}

// 1 / its length; 0 for a vector of length 0, which has no direction
template <class In>
static double unit_factor(const In* vector, std::int64_t width) {
    const double square = squared_distance<In>(vector, 1.0, nullptr, 0.0, width);
    return square == 0.0 ? 0.0 : 1.0 / ::sqrt(square);
}

template <class In>
static void measure_state(const FastforgetStateRows& arguments, const In* state, std::int64_t row) {
    const std::int64_t width = arguments.width;
    const bool cosine = arguments.cosine != 0;
    const double factor = cosine ? unit_factor(state, width) : 1.0;
    const auto distance_from = [&](const float* point, double point_factor) {
        if (factor * point_factor == 0.0) return 1.0;
        const double square = squared_distance(state, factor, point, point_factor, width);
        return cosine ? 0.5 * square : ::sqrt(square);
    };
    if (arguments.anchor != nullptr) {
        const float* const anchor = arguments.anchor + row * arguments.anchor_stride;
        arguments.values[row] = static_cast<float>(distance_from(anchor, cosine ? unit_factor(anchor, width) : 1.0));
    }
    if (arguments.centres == nullptr) return;
    double pull = INFINITY, all_distances = 0.0;  // the sum is NaN where one of them is: the smallest passes over it
    std::int64_t nearest = 0;
    for (std::int64_t centre = 0; centre < arguments.centre_count; ++centre) {
        const float* const point = arguments.centres + centre * width;
        const bool directed = !cosine || squared_distance<float>(point, 1.0, nullptr, 0.0, width) != 0.0;
        const double distance = distance_from(point, directed ? 1.0 : 0.0);
        all_distances += distance;
        if (distance < pull) {
            pull = distance;
            nearest = centre;
        }
    }
    const double found = all_distances == all_distances ? pull : all_distances;
    arguments.values[arguments.values_stride + row] = static_cast<float>(found);
    arguments.nearest[row] = nearest;
}

static void state_row(const FastforgetStateRows& arguments, std::int64_t row) {
    const FastforgetRows& states = arguments.states;
    const std::int64_t offset = row * states.stride;
    switch (states.dtype) {
        case FASTFORGET_FLOAT32: return measure_state(arguments, static_cast<const float*>(states.data) + offset, row);
        case FASTFORGET_BFLOAT16:
            return measure_state(arguments, static_cast<const BFloat16*>(states.data) + offset, row);
        default: return measure_state(arguments, static_cast<const Float16*>(states.data) + offset, row);
    }
}
