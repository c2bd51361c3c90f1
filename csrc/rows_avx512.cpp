// The passes for machines with AVX512.
//
// Standard headers come first, before the instructions are switched on: an inline function of theirs that was compiled
// with these could be the one that the linker keeps for everybody.

#include <cmath>
#include <cstring>

#include "tile_passes.h"

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
#include "every_pass.h"
}  // namespace avx512

const TilePasses avx512_passes = FASTFORGET_PASSES(avx512);

}  // namespace fastforget

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
