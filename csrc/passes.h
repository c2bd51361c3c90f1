// What each instruction set includes into a namespace of its own, after its simd_*.h; no include guard.

#include "arithmetic.h"
//
#include "blocks.h"
//
#include "coupled_tile.h"
#include "gradient_tile.h"
#include "label_tile.h"
#include "paired_tile.h"

// In the order of FastforgetPass
constexpr RowPass* passes[FASTFORGET_PASS_COUNT] = {label_tile<false>,
                                                    label_tile<true>,
                                                    paired_tile,
                                                    coupled_tile<FASTFORGET_REVERSE_KL>,
                                                    coupled_tile<FASTFORGET_JSD>,
                                                    gradient_tile};
