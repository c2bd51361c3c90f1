// One hidden state against its anchor and the nearest of K centres.
//
// Distances are formed from differences, so that a state that is almost its anchor keeps its digits; the cosine distance
// is half the squared difference of the unit vectors.

// The sum of (a * factor_a - b * factor_b)^2; b null: of (a * factor_a)^2
static inline double squared_distance(const float* a, float factor_a, const float* b, float factor_b, std::int64_t width) {
    double total = 0.0;
    Block block, other;
    for (std::int64_t start = 0; start < width; start += BLOCK) {
        const int count = length_of_block(start, width);
        const int whole = count / Floats::lanes * Floats::lanes;
        const Floats scale_a = all(factor_a), scale_b = all(factor_b);
        Floats sums[2] = {zero(), zero()};
        int i = 0;
        for (; i < whole; i += Floats::lanes) {
            Floats gap = load(a + start + i) * scale_a;
            if (b != nullptr) gap = gap - load(b + start + i) * scale_b;
            sums[i / Floats::lanes % 2] = multiply_add(gap, gap, sums[i / Floats::lanes % 2]);
        }
        if (whole < count) {
            read_block(a + start + whole, count - whole, factor_a, block);
            Floats gap = load(block.at);
            if (b != nullptr) {
                read_block(b + start + whole, count - whole, factor_b, other);
                gap = gap - load(other.at);
            }
            sums[0] = multiply_add(gap, gap, sums[0]);
        }
        total += sum_of(sums[0] + sums[1]);
    }
    return total;
}

static inline double reciprocal(double value) { return value > 0.0 || value != value ? 1.0 / value : 0.0; }

template <class In>
static const float* widened_row(const In* from, std::int64_t width, float* scratch) {
    Block block;
    for (std::int64_t start = 0; start < width; start += BLOCK) {
        const int count = length_of_block(start, width);
        read_block(from + start, count, 1.0f, block);
        write_block(block, count, scratch + start);
    }
    return scratch;
}

static void state_row(const FastforgetStateRows& arguments, std::int64_t row, float* scratch) {
    const std::int64_t width = arguments.width, offset = row * arguments.states_stride;
    const float* state;
    switch (arguments.states_dtype) {
        case FASTFORGET_FLOAT32: state = static_cast<const float*>(arguments.states) + offset; break;
        case FASTFORGET_BFLOAT16:
            state = widened_row(static_cast<const BFloat16*>(arguments.states) + offset, width, scratch);
            break;
        default: state = widened_row(static_cast<const Float16*>(arguments.states) + offset, width, scratch);
    }
    const bool cosine = arguments.cosine != 0;
    const double factor = cosine ? reciprocal(::sqrt(squared_distance(state, 1.0f, nullptr, 0.0f, width))) : 1.0;
    if (arguments.anchor != nullptr) {
        const float* anchor = arguments.anchor + row * arguments.anchor_stride;
        const double anchor_factor =
            cosine ? reciprocal(::sqrt(squared_distance(anchor, 1.0f, nullptr, 0.0f, width))) : 1.0;
        const double square = squared_distance(state, static_cast<float>(factor), anchor,
                                               static_cast<float>(anchor_factor), width);
        const bool undirected = factor * anchor_factor == 0.0;  // a vector of length 0 has no direction
        const double distance = cosine ? (undirected ? 1.0 : 0.5 * square) : ::sqrt(square);
        arguments.values[row] = static_cast<float>(distance);
    }
    if (arguments.centres == nullptr) return;
    double pull = INFINITY, all_distances = 0.0;  // the sum is NaN where one of them is: the smallest passes over it
    std::int64_t nearest = 0;
    for (std::int64_t centre = 0; centre < arguments.centre_count; ++centre) {
        const float* point = arguments.centres + centre * width;
        double distance = squared_distance(state, static_cast<float>(factor), point, 1.0f, width);
        if (cosine) {
            const bool undirected = factor == 0.0 || squared_distance(point, 1.0f, nullptr, 0.0f, width) == 0.0;
            distance = undirected ? 1.0 : 0.5 * distance;
        } else {
            distance = ::sqrt(distance);
        }
        all_distances += distance;
        if (distance < pull) {
            pull = distance;
            nearest = centre;
        }
    }
    arguments.values[arguments.values_stride + row] =
        static_cast<float>(all_distances == all_distances ? pull : all_distances);
    arguments.nearest[row] = nearest;
}
