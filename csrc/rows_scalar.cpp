// The passes in plain C++.

#include <cmath>
#include <cstring>

#include "row_passes.h"

namespace fastforget {
namespace scalar {
#include "half.h"
#include "simd_scalar.h"
//
#include "arithmetic.h"
//
#include "coupled_tile.h"
#include "gradient_tile.h"
#include "label_tile.h"
#include "paired_tile.h"
#include "state_rows.h"
}  // namespace scalar

const RowPasses scalar_passes = {scalar::label_tile, scalar::paired_tile, scalar::coupled_tile, scalar::gradient_tile, scalar::state_row};

}  // namespace fastforget
