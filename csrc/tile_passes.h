// One table of row functions for each instruction set; a function does one row of a tile. Each table is filled by a file
// of its own (rows_scalar.cpp, rows_avx2.cpp, rows_avx512.cpp), compiled for its instructions; cpu.cpp chooses.
#pragma once

#include "fastforget.h"

namespace fastforget {

struct TilePasses {
    void (*label_tile)(const FastforgetLabelTile&, std::int64_t row);
    void (*paired_tile)(const FastforgetPairedTile&, std::int64_t row);
    void (*coupled_tile)(const FastforgetCoupledTile&, std::int64_t row);
    void (*gradient_tile)(const FastforgetGradientTile&, std::int64_t row);
    void (*state_row)(const FastforgetStateRows&, std::int64_t row);
};

extern const TilePasses scalar_passes;
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define FASTFORGET_X86 1
extern const TilePasses avx2_passes;
extern const TilePasses avx512_passes;
#endif

// Of one of these numbers, or of the best that the machine has where that is less; null for an unknown number.
const TilePasses* passes_of(std::int32_t instruction_set);

constexpr int BLOCK = 2048;  // logits at a time: a block of two rows and its weights stay in the first-level cache

// As in protocol.py
constexpr float LAZY = 30.0f;
constexpr float FLOAT16_SCALE = 8192.0f;
constexpr double RECENTRE = 0.5;
constexpr float NEAR_SHIFT = 8.0f;

}  // namespace fastforget
