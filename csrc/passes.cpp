// The entry points: what can be checked of their arguments, then rows over threads.
//
// One build serves every x86-64 machine, and others: the passes are compiled once for each instruction set, and chosen
// when they run. GCC and Clang compile a function for instructions that the rest of the file may not use, and ask the
// operating system too whether it saves the wide registers. MSVC does not, so there, as on ARM, passes are scalar.
//
// Standard headers come before the instructions are switched on: an inline function of theirs that was compiled with
// these could be the one that the linker keeps for everybody.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fastforget.h"
#include "half.h"
#include "threads.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define FASTFORGET_X86 1
#include <immintrin.h>
#define FASTFORGET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTFORGET_BEGIN(set) \
    FASTFORGET_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define FASTFORGET_END FASTFORGET_PRAGMA(clang attribute pop)
#else
#define FASTFORGET_BEGIN(set) FASTFORGET_PRAGMA(GCC push_options) FASTFORGET_PRAGMA(GCC target(set))
#define FASTFORGET_END FASTFORGET_PRAGMA(GCC pop_options)
// GCC 12 warns of its own intrinsics, whose undefined operands are meant (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

namespace fastforget {

using RowPass = void(const FastforgetTile&, std::int64_t row);

constexpr int BLOCK = 2048;  // logits at a time: a block of two rows and its weights stay in the first-level cache

// As in protocol.py
constexpr int BASIC_ACCUMULATORS = 4;
constexpr float LAZY = 30.0f;
constexpr float FLOAT16_SCALE = 8192.0f;
constexpr double RECENTRE = 0.5;
constexpr float NEAR_SHIFT = 8.0f;

namespace scalar {
#include "simd_scalar.h"
//
#include "passes.h"
}  // namespace scalar

#ifdef FASTFORGET_X86
FASTFORGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#include "simd_avx2.h"
//
#include "passes.h"
}  // namespace avx2
FASTFORGET_END

FASTFORGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "simd_avx512.h"
//
#include "passes.h"
}  // namespace avx512
FASTFORGET_END
#endif

namespace {

// From least to most
constexpr struct {
    const char* name;
    RowPass* const* passes;
} instruction_sets[] = {
    {"scalar", scalar::passes},
#ifdef FASTFORGET_X86
    {"avx2", avx2::passes},
    {"avx512", avx512::passes},
#endif
};

// The place in `instruction_sets` of the best that the machine has
int best_supported() {
#ifdef FASTFORGET_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;  // AVX2 brings F16C along
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return has_avx512 ? 2 : 1;
#else
    return 0;
#endif
}

constexpr std::int64_t WORTH_A_THREAD = 16384;  // numbers: another thread is not woken for less

bool inside(const std::int64_t* index, std::int64_t count, std::int64_t least, std::int64_t end) {
    return std::all_of(index, index + count, [=](std::int64_t each) { return each >= least && each < end; });
}

// Whether rows may be read (or written) as far as the tile says, without reaching into one another
bool separate(const FastforgetTile& tile, const FastforgetRows& rows, bool written) {
    if (rows.dtype < FASTFORGET_FLOAT32 || rows.dtype > FASTFORGET_FLOAT16) return false;
    const bool may_overlap = rows.data == nullptr || tile.row_count < 2 || (!written && tile.padded == tile.columns);
    return may_overlap || rows.stride >= tile.padded;
}

// What is written over what it is read from must not run ahead of the reading
bool behind(const FastforgetRows& written, const FastforgetRows& read) {
    return written.data != read.data || written.dtype == read.dtype || read.dtype == FASTFORGET_FLOAT32;
}

bool valid(const FastforgetTile& tile) {
    for (int k = 0; k < 2; ++k) {
        const FastforgetRows &read = tile.products[k], &written = tile.rows[k];
        if (!separate(tile, read, false) || !separate(tile, written, true) || !behind(written, read)) return false;
    }
    return tile.instruction_set >= 0 && tile.row_count >= 0 && tile.columns > 0 && tile.padded >= tile.columns &&
           tile.first >= 0 && tile.first <= tile.vocabulary - tile.columns;
}

}  // namespace
}  // namespace fastforget

std::int32_t fastforget_abi_version() { return FASTFORGET_ABI_VERSION; }

const char* fastforget_threading() { return fastforget::threading; }

const char* fastforget_instruction_set(const char* requested) {
    using namespace fastforget;
    int picked = best_supported();
    for (int each = 0; requested != nullptr && each < picked; ++each) {
        if (std::strcmp(requested, instruction_sets[each].name) == 0) picked = each;
    }
    return instruction_sets[picked].name;
}

std::int32_t fastforget_tile(std::int32_t pass, const FastforgetTile* arguments) {
    using namespace fastforget;
    const FastforgetTile& tile = *arguments;
    if (pass < 0 || pass >= FASTFORGET_PASS_COUNT || !valid(tile)) return FASTFORGET_BAD_ARGUMENT;
    const bool labelled = pass == FASTFORGET_LABEL || pass == FASTFORGET_LABEL_MOMENTS || pass == FASTFORGET_GRADIENT;
    if (!inside(tile.labels, tile.row_count, labelled ? 0 : INT64_MIN, tile.vocabulary) ||
        (tile.argmax != nullptr && !inside(tile.argmax, tile.row_count, -1, tile.vocabulary))) {
        return FASTFORGET_BAD_INDEX;
    }
    RowPass* const row_pass = instruction_sets[std::min<int>(tile.instruction_set, best_supported())].passes[pass];
    const std::int64_t useful = 1 + tile.row_count * tile.columns / WORTH_A_THREAD;
    const auto threads = std::min<std::int64_t>(tile.threads, useful);
    for_each_row(tile.row_count, threads, [&](std::int64_t row) { row_pass(tile, row); });
    return FASTFORGET_OK;
}
