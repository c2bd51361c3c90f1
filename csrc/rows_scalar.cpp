// The row passes in plain C++.

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
#include "label_rows.h"
//
#include "label_tiles.h"
//
#include "gradient_rows.h"
#include "paired_rows.h"
#include "state_rows.h"
#include "tile_product.h"
}  // namespace scalar

const RowPasses scalar_passes = {
    scalar::label_row,    scalar::label_tile, scalar::label_end,    scalar::paired_row,
    scalar::gradient_row, scalar::state_row,  scalar::tile_product, scalar::STEP,
};

}  // namespace fastforget
