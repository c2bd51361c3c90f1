// One table of row functions for each instruction set; a function does one row. Each table is filled by a file of its
// own (rows_scalar.cpp, rows_avx2.cpp, rows_avx512.cpp), compiled for its instructions; cpu.cpp chooses.
#pragma once

#include "fastforget.h"

namespace fastforget {

struct RowPasses {
    void (*label_tile)(const FastforgetLabelTile&, std::int64_t row);
    void (*paired_tile)(const FastforgetPairedTile&, std::int64_t row);
    void (*coupled_tile)(const FastforgetCoupledTile&, std::int64_t row);
    void (*gradient_tile)(const FastforgetGradientTile&, std::int64_t row);
    void (*state_row)(const FastforgetStateRows&, std::int64_t row, float* scratch);  // scratch: width floats, of 16-bit states
};

extern const RowPasses scalar_passes;
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define FASTFORGET_X86 1
extern const RowPasses avx2_passes;
extern const RowPasses avx512_passes;
#endif

// Of one of these numbers, or of the best that the machine has where that is less; null for an unknown number.
const RowPasses* passes_of(std::int32_t instruction_set);

constexpr int BLOCK = 2048;  // logits at a time: a block of two rows and its weights stay in the first-level cache

}  // namespace fastforget
