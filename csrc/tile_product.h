// The second product over live tiles only: out[row] += scale * sum of g_v W_v over each tile that the row keeps.
//
// A task has some columns of the states, so that no two write to the same place, and goes through all tiles. Of each tile
// a panel of the weight is copied side by side into the first-level cache, in float32 (in place, rows of a power of two
// of bytes would all fall on the same cache lines), for all rows that keep the tile: six at a time in registers.

constexpr int TOGETHER = 6;                           // rows
constexpr int VECTORS = Floats::lanes == 16 ? 4 : 2;  // of columns: with TOGETHER rows, as many sums as fit the registers
constexpr int STEP = VECTORS * Floats::lanes;

struct alignas(64) Panel {
    float at[FASTFORGET_TILE * STEP];
};

// Copy `count` rows of STEP columns; and ask for those that come next, as they lie too far apart to be guessed.
template <class In>
static inline void read_panel(const In* from, const In* next, std::int64_t stride, int count, Panel& panel) {
    for (int v = 0; v < count; ++v) {
        for (int k = 0; k < STEP; k += Floats::lanes) {
            store(panel.at + v * STEP + k, load(from + v * stride + k));
#if defined(__GNUC__)
            if (next != nullptr) __builtin_prefetch(next + v * stride + k);
#endif
        }
    }
}

template <int ROWS>
static inline void add_tile(const float* const* rows, const Panel& panel, int count, float scale, float* const* out) {
    Floats sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int k = 0; k < VECTORS; ++k) sums[r][k] = zero();
    }
    const float* weight = panel.at;
    for (int v = 0; v < count; ++v, weight += STEP) {
        Floats part[VECTORS];
        for (int k = 0; k < VECTORS; ++k) part[k] = load(weight + k * Floats::lanes);
        for (int r = 0; r < ROWS; ++r) {
            const Floats g = all(rows[r][v]);
            for (int k = 0; k < VECTORS; ++k) sums[r][k] = multiply_add(g, part[k], sums[r][k]);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int k = 0; k < VECTORS; ++k) {
            float* const to = out[r] + k * Floats::lanes;
            store(to, multiply_add(sums[r][k], all(scale), load(to)));
        }
    }
}

static inline void add_tiles(int taken, const float* const* rows, const Panel& panel, int count, float scale,
                             float* const* out) {
    switch (taken) {
        case 1: return add_tile<1>(rows, panel, count, scale, out);
        case 2: return add_tile<2>(rows, panel, count, scale, out);
        case 3: return add_tile<3>(rows, panel, count, scale, out);
        case 4: return add_tile<4>(rows, panel, count, scale, out);
        case 5: return add_tile<5>(rows, panel, count, scale, out);
        default: return add_tile<TOGETHER>(rows, panel, count, scale, out);
    }
}

// One row and tile, for the columns that fill no step
template <class In>
static inline void add_columns(const float* row, const In* weight, std::int64_t stride, int count, std::int64_t columns,
                               float scale, float* out) {
    for (std::int64_t c = 0; c < columns; ++c) {
        double sum = 0.0;
        for (int v = 0; v < count; ++v) sum += row[v] * static_cast<double>(widened(weight[v * stride + c]));
        out[c] += static_cast<float>(sum * scale);
    }
}

template <class In>
static void tile_product_of(const FastforgetTileProduct& arguments, std::int64_t first, std::int64_t last) {
    const FastforgetCommon& common = arguments.common;
    const In* const weight = static_cast<const In*>(arguments.weight);
    const std::int64_t stride = arguments.weight_stride, tiles = arguments.tile_count;
    const std::int64_t* const offsets = arguments.tile_offsets;
    const auto count_of = [&](std::int64_t tile) {
        const std::int64_t left = common.vocabulary - tile * FASTFORGET_TILE;
        return left < FASTFORGET_TILE ? static_cast<int>(left) : static_cast<int>(FASTFORGET_TILE);
    };
    Panel panel;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        if (offsets[tile] == offsets[tile + 1]) continue;
        std::int64_t following = tile + 1;
        while (following < tiles && offsets[following] == offsets[following + 1]) ++following;
        const std::int64_t start = tile * FASTFORGET_TILE;
        const int count = count_of(tile);
        const In* const tile_weight = weight + start * stride;
        for (std::int64_t column = first; column < last; column += STEP) {
            const bool whole = column + STEP <= last;
            const In* next = nullptr;
            if (column + 2 * STEP <= last) {
                next = tile_weight + column + STEP;
            } else if (following < tiles && count_of(following) >= count) {
                next = weight + following * FASTFORGET_TILE * stride + first;
            }
            if (whole) read_panel(tile_weight + column, next, stride, count, panel);
            for (std::int64_t at = offsets[tile]; at < offsets[tile + 1];) {
                const std::int64_t members = offsets[tile + 1] - at;
                const int taken = members < TOGETHER ? static_cast<int>(members) : TOGETHER;
                const float* rows[TOGETHER];
                float* out[TOGETHER];
                for (int r = 0; r < taken; ++r) {
                    const std::int64_t row = arguments.tile_rows[at + r];
                    rows[r] = arguments.rows + row * arguments.rows_stride + start;
                    out[r] = arguments.out + row * arguments.out_stride + column;
                }
                at += taken;
                if (whole) {
                    add_tiles(taken, rows, panel, count, common.scale, out);
                } else {
                    for (int r = 0; r < taken; ++r) {
                        add_columns(rows[r], tile_weight + column, stride, count, last - column, common.scale, out[r]);
                    }
                }
            }
        }
    }
}

static void tile_product(const FastforgetTileProduct& arguments, std::int64_t first, std::int64_t last) {
    switch (arguments.weight_dtype) {
        case FASTFORGET_FLOAT32: return tile_product_of<float>(arguments, first, last);
        case FASTFORGET_BFLOAT16: return tile_product_of<BFloat16>(arguments, first, last);
        default: return tile_product_of<Float16>(arguments, first, last);
    }
}
