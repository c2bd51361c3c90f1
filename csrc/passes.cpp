// The entry points: what can be checked of their arguments, then rows over threads.

#include <algorithm>
#include <new>
#include <vector>

#include "row_passes.h"
#include "threads.h"

namespace {

using fastforget::for_each_row;
using fastforget::RowPasses;

bool known_dtype(std::int32_t dtype) { return dtype >= FASTFORGET_FLOAT32 && dtype <= FASTFORGET_FLOAT16; }

bool inside(const std::int64_t* index, std::int64_t count, std::int64_t end) {
    return std::all_of(index, index + count, [end](std::int64_t each) { return each >= 0 && each < end; });
}

// FASTFORGET_OK, and the table of functions
std::int32_t begin(const FastforgetCommon& common, const RowPasses*& passes) {
    passes = fastforget::passes_of(common.instruction_set);
    return passes == nullptr || common.row_count < 0 || common.vocabulary < 1 ? FASTFORGET_BAD_ARGUMENT : FASTFORGET_OK;
}

}  // namespace

const char* fastforget_threading() { return fastforget::threading; }

std::int32_t fastforget_label_rows(const FastforgetLabelRows* arguments) {
    const FastforgetCommon& common = arguments->common;
    const RowPasses* passes;
    if (const std::int32_t result = begin(common, passes)) return result;
    if (!known_dtype(arguments->logits_dtype) || !known_dtype(arguments->out_dtype)) return FASTFORGET_BAD_ARGUMENT;
    if (!inside(arguments->labels, common.row_count, common.vocabulary)) return FASTFORGET_BAD_INDEX;
    for_each_row(common.row_count, common.threads, [=](std::int64_t row) { passes->label_row(*arguments, row); });
    return FASTFORGET_OK;
}

std::int32_t fastforget_label_tile(const FastforgetLabelTile* arguments) {
    const FastforgetCommon& common = arguments->common;
    const RowPasses* passes;
    if (const std::int32_t result = begin(common, passes)) return result;
    const std::int64_t last = arguments->whole - common.vocabulary;
    if (arguments->first_column < 0 || arguments->first_column > last) return FASTFORGET_BAD_ARGUMENT;
    if (arguments->tile_stride < (common.vocabulary + 15) / 16 * 16) return FASTFORGET_BAD_ARGUMENT;
    if (!inside(arguments->labels, common.row_count, arguments->whole)) return FASTFORGET_BAD_INDEX;
    for_each_row(common.row_count, common.threads, [=](std::int64_t row) { passes->label_tile(*arguments, row); });
    return FASTFORGET_OK;
}

std::int32_t fastforget_label_end(const FastforgetLabelEnd* arguments) {
    const FastforgetCommon& common = arguments->common;
    const RowPasses* passes;
    if (const std::int32_t result = begin(common, passes)) return result;
    for_each_row(common.row_count, common.threads, [=](std::int64_t row) { passes->label_end(*arguments, row); });
    return FASTFORGET_OK;
}

std::int32_t fastforget_paired_rows(const FastforgetPairedRows* arguments) {
    const FastforgetCommon& common = arguments->common;
    const RowPasses* passes;
    if (const std::int32_t result = begin(common, passes)) return result;
    if (arguments->kind < 0 || arguments->kind > 2) return FASTFORGET_BAD_ARGUMENT;
    if (arguments->labels != nullptr &&
        !std::all_of(arguments->labels, arguments->labels + std::max<std::int64_t>(common.row_count, 0),
                     [&](std::int64_t label) { return label < common.vocabulary; })) {
        return FASTFORGET_BAD_INDEX;
    }
    for_each_row(common.row_count, common.threads, [=](std::int64_t row) { passes->paired_row(*arguments, row); });
    return FASTFORGET_OK;
}

std::int32_t fastforget_gradient_rows(const FastforgetGradientRows* arguments) {
    const FastforgetCommon& common = arguments->common;
    const RowPasses* passes;
    if (const std::int32_t result = begin(common, passes)) return result;
    if (!inside(arguments->labels, common.row_count, common.vocabulary)) return FASTFORGET_BAD_INDEX;
    if (arguments->argmax != nullptr && !inside(arguments->argmax, common.row_count, common.vocabulary)) {
        return FASTFORGET_BAD_INDEX;
    }
    for_each_row(common.row_count, common.threads, [=](std::int64_t row) { passes->gradient_row(*arguments, row); });
    return FASTFORGET_OK;
}

std::int32_t fastforget_state_rows(const FastforgetStateRows* arguments) {
    const FastforgetCommon& common = arguments->common;
    const RowPasses* passes;
    if (const std::int32_t result = begin(common, passes)) return result;
    if (!known_dtype(arguments->hidden_dtype) || arguments->centre_count < 0) return FASTFORGET_BAD_ARGUMENT;
    // A row of 16-bit states is widened once. Groups of rows share a thread, and with it the buffer.
    const std::int64_t count = common.row_count, groups = std::max<std::int64_t>(1, std::min<std::int64_t>(count, 64));
    std::vector<float> scratch;
    const bool narrow = arguments->hidden_dtype != FASTFORGET_FLOAT32;
    try {
        if (narrow) scratch.resize(static_cast<std::size_t>(groups * common.vocabulary));
    } catch (const std::bad_alloc&) {
        return FASTFORGET_NO_MEMORY;
    }
    float* const buffers = scratch.data();
    for_each_row(groups, common.threads, [=](std::int64_t group) {
        float* const buffer = narrow ? buffers + group * common.vocabulary : nullptr;
        for (std::int64_t row = group; row < count; row += groups) passes->state_row(*arguments, row, buffer);
    });
    return FASTFORGET_OK;
}

std::int32_t fastforget_live_tiles(const FastforgetLiveTiles* arguments) {
    const std::int64_t rows = arguments->row_count, tiles = arguments->tile_count;
    if (rows < 0 || tiles < 1) return FASTFORGET_BAD_ARGUMENT;
    if (!inside(arguments->labels, rows, tiles * FASTFORGET_TILE)) return FASTFORGET_BAD_INDEX;
    const auto mass = [&](std::int64_t row, std::int64_t tile) {
        return arguments->masses[row * tiles + tile] * (arguments->factor == nullptr ? 1.0f : arguments->factor[row]);
    };
    const auto needs = [&](std::int64_t row, std::int64_t tile) {
        return !(mass(row, tile) < arguments->limit) || arguments->labels[row] / FASTFORGET_TILE == tile;
    };
    std::int64_t* const offsets = arguments->tile_offsets;
    std::fill(offsets, offsets + tiles + 1, 0);
    std::int64_t dense = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
        std::int64_t needed = 0;
        double dropped = 0.0;
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            const bool live = needs(row, tile);
            needed += live;
            dropped += live ? 0.0 : mass(row, tile);
        }
        arguments->dropped[row] = static_cast<float>(dropped);
        if (needed > arguments->dense) {
            arguments->dropped[row] = 0.0f;
            arguments->dense_rows[dense++] = row;
            continue;
        }
        for (std::int64_t tile = 0; tile < tiles; ++tile) offsets[tile + 1] += needs(row, tile);
    }
    *arguments->dense_count = dense;
    for (std::int64_t tile = 0; tile < tiles; ++tile) offsets[tile + 1] += offsets[tile];
    std::int64_t next_dense = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
        if (next_dense < dense && arguments->dense_rows[next_dense] == row) {
            ++next_dense;
            continue;
        }
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            if (needs(row, tile)) arguments->tile_rows[offsets[tile]++] = row;
        }
    }
    // each tile's offset has moved to its end, which is the next one's beginning
    for (std::int64_t tile = tiles; tile > 0; --tile) offsets[tile] = offsets[tile - 1];
    offsets[0] = 0;
    return FASTFORGET_OK;
}

std::int32_t fastforget_tile_product(const FastforgetTileProduct* arguments) {
    const FastforgetCommon& common = arguments->common;
    const RowPasses* passes;
    if (const std::int32_t result = begin(common, passes)) return result;
    const std::int64_t width = arguments->width, tiles = (common.vocabulary + FASTFORGET_TILE - 1) / FASTFORGET_TILE;
    const std::int64_t* const offsets = arguments->tile_offsets;
    if (width < 1 || arguments->tile_count != tiles || !known_dtype(arguments->weight_dtype)) return FASTFORGET_BAD_ARGUMENT;
    if (offsets[0] != 0 || !std::is_sorted(offsets, offsets + tiles + 1)) return FASTFORGET_BAD_ARGUMENT;
    if (!inside(arguments->tile_rows, offsets[tiles], common.row_count)) return FASTFORGET_BAD_INDEX;
    // Wide parts read the weight in long pieces; several for each thread keep all of them busy to the end.
    const std::int64_t step = passes->column_step, wanted = 4 * std::max(common.threads, 1);
    const std::int64_t part = std::max<std::int64_t>(1, (width / wanted + step - 1) / step) * step;
    for_each_row((width + part - 1) / part, common.threads, [=](std::int64_t index) {
        passes->tile_product(*arguments, index * part, std::min(width, (index + 1) * part));
    });
    return FASTFORGET_OK;
}
