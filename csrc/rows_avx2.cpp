// The passes for machines with AVX2.
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
#include "coupled_tile.h"
#include "gradient_tile.h"
#include "label_tile.h"
#include "paired_tile.h"
#include "state_rows.h"
}  // namespace avx2

const RowPasses avx2_passes = {avx2::label_tile, avx2::paired_tile, avx2::coupled_tile, avx2::gradient_tile, avx2::state_row};

}  // namespace fastforget

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
