// The passes for machines with AVX2.
//
// Standard headers come first, before the instructions are switched on: an inline function of theirs that was compiled
// with these could be the one that the linker keeps for everybody.

#include <cmath>
#include <cstring>

#include "tile_passes.h"

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
#include "every_pass.h"
}  // namespace avx2

const TilePasses avx2_passes = FASTFORGET_PASSES(avx2);

}  // namespace fastforget

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
