// What each instruction set includes into its own namespace, after half.h and its simd_*.h.

#include "arithmetic.h"
//
#include "blocks.h"
//
#include "coupled_tile.h"
#include "gradient_tile.h"
#include "label_tile.h"
#include "paired_tile.h"
#include "state_rows.h"

#define FASTFORGET_PASSES(set) \
    {set::label_tile, set::paired_tile, set::coupled_tile, set::gradient_tile, set::state_row}
