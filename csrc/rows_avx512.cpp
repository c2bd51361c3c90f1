// The row passes for machines with AVX512.
//
// Standard headers come first, before the instructions are switched on: an inline function of theirs that was compiled
// with these could be the one that the linker keeps for everybody.

#include <cmath>
#include <cstring>

#include "row_passes.h"

#ifdef FASTFORGET_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
// GCC 12 warns of its own intrinsics, whose undefined operands are meant (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace fastforget {
namespace avx512 {
#include "half.h"
#include "simd_avx512.h"
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
}  // namespace avx512

const RowPasses avx512_passes = {
    avx512::label_row,    avx512::label_tile, avx512::label_end,    avx512::paired_row,
    avx512::gradient_row, avx512::state_row,  avx512::tile_product, avx512::STEP,
};

}  // namespace fastforget

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
