// The row passes for machines with AVX2.
//
// Standard headers come first, before the instructions are switched on: an inline function of theirs that was compiled
// with these could be the one that the linker keeps for everybody.

#include <cmath>
#include <cstring>

#include "row_passes.h"

#ifdef FASTFORGET_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
// GCC 12 warns of its own intrinsics, whose undefined operands are meant (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,f16c")
#endif

namespace fastforget {
namespace avx2 {
#include "half.h"
#include "simd_avx2.h"
//
#include "arithmetic.h"
//
#include "label_rows.h"
//
#include "label_tiles.h"
//
#include "gradient_rows.h"
#include "paired_rows.h"
#include "state_rows.h"
#include "tile_product.h"
}  // namespace avx2

const RowPasses avx2_passes = {
    avx2::label_row,    avx2::label_tile, avx2::label_end,    avx2::paired_row,
    avx2::gradient_row, avx2::state_row,  avx2::tile_product, avx2::STEP,
};

}  // namespace fastforget

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
