// The entry points: what can be checked of their arguments, then rows over threads, on the instruction set of the machine.
//
// One build serves every x86-64 machine, and others: the passes are compiled once for each instruction set. GCC and Clang
// compile a function for instructions that the rest of the file may not use, and ask the operating system too whether it
// saves the wide registers. MSVC does not, so there, as on ARM, passes are scalar.

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

// Each does one row
struct RowPasses {
    void (*tile[FASTFORGET_PASS_COUNT])(const FastforgetTile&, std::int64_t row);
    void (*state)(const FastforgetStates&, std::int64_t row);
};

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
    const RowPasses* passes;
} instruction_sets[] = {
    {"scalar", &scalar::passes},
#ifdef FASTFORGET_X86
    {"avx2", &avx2::passes},
    {"avx512", &avx512::passes},
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

// Each row of 0..rows-1 over threads; `columns`: how many numbers a row has
template <class Arguments>
std::int32_t run(void (*pass)(const Arguments&, std::int64_t), const Arguments& arguments, std::int64_t columns) {
    const std::int64_t rows = arguments.row_count;
    const auto threads = std::min<std::int64_t>(arguments.threads, 1 + rows * columns / WORTH_A_THREAD);
    for_each_row(rows, threads, [&](std::int64_t row) { pass(arguments, row); });
    return FASTFORGET_OK;
}

// Of one of these numbers, or of the best that the machine has where that is less; null for an unknown number
const RowPasses* passes_of(std::int32_t instruction_set) {
    if (instruction_set < 0 || instruction_set > 2) return nullptr;
    return instruction_sets[std::min<int>(instruction_set, best_supported())].passes;
}

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

bool valid(const FastforgetTile& tile) {
    for (int k = 0; k < 2; ++k) {
        const FastforgetRows &read = tile.products[k], &written = tile.rows[k];
        if (!separate(tile, read, false) || !separate(tile, written, true) || !behind(written, read)) return false;
    }
    return tile.row_count >= 0 && tile.columns > 0 && tile.first >= 0 && tile.first <= tile.vocabulary - tile.columns &&
           tile.padded >= tile.columns;
}

}  // namespace
}  // namespace fastforget

std::int32_t fastforget_abi_version() { return FASTFORGET_ABI_VERSION; }

const char* fastforget_threading() { return fastforget::threading; }

const char* fastforget_instruction_set(const char* requested) {
    int picked = fastforget::best_supported();
    for (int candidate = 0; candidate < picked; ++candidate) {
        if (requested != nullptr && std::strcmp(requested, fastforget::instruction_sets[candidate].name) == 0) {
            picked = candidate;
        }
    }
    return fastforget::instruction_sets[picked].name;
}

std::int32_t fastforget_tile(std::int32_t pass, const FastforgetTile* arguments) {
    const FastforgetTile& tile = *arguments;
    const fastforget::RowPasses* const passes = fastforget::passes_of(tile.instruction_set);
    if (passes == nullptr || pass < 0 || pass >= FASTFORGET_PASS_COUNT || !fastforget::valid(tile)) {
        return FASTFORGET_BAD_ARGUMENT;
    }
    const bool labelled = pass == FASTFORGET_LABEL || pass == FASTFORGET_LABEL_MOMENTS || pass == FASTFORGET_GRADIENT;
    if (!fastforget::inside(tile.labels, tile.row_count, labelled ? 0 : INT64_MIN, tile.vocabulary) ||
        (tile.argmax != nullptr && !fastforget::inside(tile.argmax, tile.row_count, -1, tile.vocabulary))) {
        return FASTFORGET_BAD_INDEX;
    }
    return fastforget::run(passes->tile[pass], tile, tile.columns);
}

std::int32_t fastforget_states(const FastforgetStates* arguments) {
    const FastforgetStates& given = *arguments;
    const fastforget::RowPasses* const passes = fastforget::passes_of(given.instruction_set);
    if (passes == nullptr || given.row_count < 0 || given.width < 0 || !fastforget::known_dtype(given.states) ||
        (given.centres != nullptr && given.centre_count < 1)) {
        return FASTFORGET_BAD_ARGUMENT;
    }
    return fastforget::run(passes->state, given, given.width * (1 + given.centre_count));
}
