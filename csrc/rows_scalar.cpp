// The passes in plain C++.

#include <cmath>
#include <cstring>

#include "tile_passes.h"

namespace fastforget {
namespace scalar {
#include "half.h"
#include "simd_scalar.h"
//
#include "every_pass.h"
}  // namespace scalar

const TilePasses scalar_passes = FASTFORGET_PASSES(scalar);

}  // namespace fastforget
