// The entry points: what can be checked of their arguments, then rows over threads.

#include <algorithm>
#include <initializer_list>

#include "threads.h"
#include "tile_passes.h"

namespace {

using fastforget::for_each_row;
using fastforget::TilePasses;

constexpr std::int64_t WORTH_A_THREAD = 16384;  // numbers: another thread is not woken for less

bool inside(const std::int64_t* index, std::int64_t count, std::int64_t least, std::int64_t end) {
    return std::all_of(index, index + count, [=](std::int64_t each) { return each >= least && each < end; });
}

bool known_dtype(const FastforgetRows& rows) {
    return rows.dtype >= FASTFORGET_FLOAT32 && rows.dtype <= FASTFORGET_FLOAT16;
}

// Whether rows may be read (or written) as far as the tile says, without reaching into one another
bool separate(const FastforgetTile& tile, const FastforgetRows& rows, bool written) {
    if (!known_dtype(rows)) return false;
    const bool may_overlap = rows.data == nullptr || tile.row_count < 2 || (!written && tile.padded == tile.columns);
    return may_overlap || rows.stride >= tile.padded;
}

// What is written over what it is read from must not run ahead of the reading
bool behind(const FastforgetRows& written, const FastforgetRows& read) {
    return written.data != read.data || written.dtype == read.dtype || read.dtype == FASTFORGET_FLOAT32;
}

bool valid(const FastforgetTile& tile, std::initializer_list<FastforgetRows> read,
           std::initializer_list<FastforgetRows> written) {
    const auto may_read = [&](const FastforgetRows& rows) { return separate(tile, rows, false); };
    const auto may_write = [&](const FastforgetRows& rows) { return separate(tile, rows, true); };
    return tile.row_count >= 0 && tile.columns > 0 && tile.first >= 0 && tile.first <= tile.vocabulary - tile.columns &&
           tile.padded >= tile.columns && std::all_of(read.begin(), read.end(), may_read) &&
           std::all_of(written.begin(), written.end(), may_write);
}

std::int32_t useful_threads(std::int64_t rows, std::int64_t columns, std::int32_t threads) {
    return static_cast<std::int32_t>(std::min<std::int64_t>(threads, 1 + rows * columns / WORTH_A_THREAD));
}

// Rows of a tile over threads, each by the same pass
template <class Arguments>
std::int32_t run(void (*TilePasses::*pass)(const Arguments&, std::int64_t), const Arguments& arguments) {
    const FastforgetTile& tile = arguments.tile;
    const TilePasses* const passes = fastforget::passes_of(tile.instruction_set);
    if (passes == nullptr) return FASTFORGET_BAD_ARGUMENT;
    const auto row_pass = passes->*pass;
    const std::int32_t threads = useful_threads(tile.row_count, tile.columns, tile.threads);
    for_each_row(tile.row_count, threads, [&](std::int64_t row) { row_pass(arguments, row); });
    return FASTFORGET_OK;
}

constexpr std::int64_t ANY = INT64_MIN;

}  // namespace

const char* fastforget_threading() { return fastforget::threading; }

std::int32_t fastforget_label_tile(const FastforgetLabelTile* arguments) {
    const FastforgetTile& tile = arguments->tile;
    if (!valid(tile, {arguments->product}, {arguments->rows}) || !behind(arguments->rows, arguments->product)) {
        return FASTFORGET_BAD_ARGUMENT;
    }
    if (!inside(arguments->labels, tile.row_count, 0, tile.vocabulary)) return FASTFORGET_BAD_INDEX;
    return run(&TilePasses::label_tile, *arguments);
}

std::int32_t fastforget_paired_tile(const FastforgetPairedTile* arguments) {
    const FastforgetTile& tile = arguments->tile;
    if (!valid(tile, {arguments->policy, arguments->reference}, {arguments->rows, arguments->reference_rows}) ||
        !behind(arguments->rows, arguments->policy) || !behind(arguments->reference_rows, arguments->reference)) {
        return FASTFORGET_BAD_ARGUMENT;
    }
    if (!inside(arguments->labels, tile.row_count, ANY, tile.vocabulary)) return FASTFORGET_BAD_INDEX;
    return run(&TilePasses::paired_tile, *arguments);
}

std::int32_t fastforget_coupled_tile(const FastforgetCoupledTile* arguments) {
    const FastforgetTile& tile = arguments->tile;
    if (!valid(tile, {arguments->policy, arguments->reference}, {arguments->rows, arguments->policy_rows}) ||
        !behind(arguments->rows, arguments->policy) || !behind(arguments->policy_rows, arguments->reference) ||
        (arguments->kind != FASTFORGET_REVERSE_KL && arguments->kind != FASTFORGET_JSD)) {
        return FASTFORGET_BAD_ARGUMENT;
    }
    if (!inside(arguments->labels, tile.row_count, ANY, tile.vocabulary)) return FASTFORGET_BAD_INDEX;
    return run(&TilePasses::coupled_tile, *arguments);
}

std::int32_t fastforget_gradient_tile(const FastforgetGradientTile* arguments) {
    const FastforgetTile& tile = arguments->tile;
    if (!valid(tile, {arguments->product, arguments->projected}, {arguments->rows}) ||
        !behind(arguments->rows, arguments->product)) {
        return FASTFORGET_BAD_ARGUMENT;
    }
    if (!inside(arguments->labels, tile.row_count, 0, tile.vocabulary) ||
        !inside(arguments->argmax, tile.row_count, -1, tile.vocabulary)) {
        return FASTFORGET_BAD_INDEX;
    }
    return run(&TilePasses::gradient_tile, *arguments);
}

std::int32_t fastforget_state_rows(const FastforgetStateRows* arguments) {
    const FastforgetStateRows& given = *arguments;
    const TilePasses* const passes = fastforget::passes_of(given.instruction_set);
    if (passes == nullptr || given.row_count < 0 || given.width < 0 || !known_dtype(given.states) ||
        (given.centres != nullptr && given.centre_count < 1)) {
        return FASTFORGET_BAD_ARGUMENT;
    }
    const std::int32_t threads = useful_threads(given.row_count, given.width * (1 + given.centre_count), given.threads);
    for_each_row(given.row_count, threads, [&](std::int64_t row) { passes->state_row(given, row); });
    return FASTFORGET_OK;
}
