// The passes for machines with AVX512.
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
#include "coupled_tile.h"
#include "gradient_tile.h"
#include "label_tile.h"
#include "paired_tile.h"
#include "state_rows.h"
}  // namespace avx512

const RowPasses avx512_passes = {avx512::label_tile, avx512::paired_tile, avx512::coupled_tile, avx512::gradient_tile, avx512::state_row};

}  // namespace fastforget

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
