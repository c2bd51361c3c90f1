// The C ABI of fastforget's CPU library. Loaded by path with ctypes: see fastforget/backends/library.py, whose structures
// mirror these field by field.
//
// Every function takes rows as the driver has them: elements of a row side by side, any stride (in elements) between
// rows. Offsets are 64-bit throughout. Nothing here allocates what it returns, throws, or keeps a pointer.
#pragma once

#include <cmath>
#include <cstdint>

// Raised whenever a function below changes its meaning or its arguments; library.py refuses a library of another number.
#define FASTFORGET_ABI_VERSION 5

#if defined(_WIN32)
#define FASTFORGET_API extern "C" __declspec(dllexport)
#else
#define FASTFORGET_API extern "C" __attribute__((visibility("default")))
#endif

FASTFORGET_API std::int32_t fastforget_abi_version();

// The instruction set that run-time dispatch picks on this machine: "avx512", "avx2" or "scalar".
// `requested` is one of these names, to ask for less than the machine has; null, empty or unknown asks for the best.
// Never more than the machine has: asking for avx512 on a machine with AVX2 picks "avx2".
FASTFORGET_API const char* fastforget_instruction_set(const char* requested);

// How threads are made: "openmp" (torch's own pool, where torch uses the same library) or "threads".
FASTFORGET_API const char* fastforget_threading();

enum FastforgetDtype : std::int32_t { FASTFORGET_FLOAT32 = 0, FASTFORGET_BFLOAT16 = 1, FASTFORGET_FLOAT16 = 2 };

// What a pass returns. Labels and argmax are looked at before anything is written.
enum FastforgetResult : std::int32_t {
    FASTFORGET_OK = 0,
    FASTFORGET_BAD_INDEX = 1,     // a label (or argmax) outside the vocabulary
    FASTFORGET_BAD_ARGUMENT = 2,  // an unknown dtype, kind or instruction set, or a negative size
    FASTFORGET_NO_MEMORY = 3,
};

// What all passes share. `instruction_set`: the name's place in ("scalar", "avx2", "avx512"), brought down to what the
// machine has. Logits are z = scale * product + bias, then softcap * tanh(z / softcap) where softcap > 0.
struct FastforgetCommon {
    std::int64_t row_count;
    std::int64_t vocabulary;  // or the width of the states
    const float* bias;        // (vocabulary) or null
    float scale;
    float softcap;
    std::int32_t threads;
    std::int32_t instruction_set;
};

constexpr std::int32_t FASTFORGET_TILE = 128;  // tokens that the second product skips or keeps together

// One row pass over the products of a chunk; kernels/label_rows.py has the same in Triton, and the formulas.
struct FastforgetLabelRows {
    FastforgetCommon common;
    const void* logits;  // (row_count, vocabulary)
    std::int64_t logits_stride;
    const std::int64_t* labels;
    void* out;  // written rows, or null; may be `logits`, in the same dtype
    std::int64_t out_stride;
    float* fields;         // (12, row_count), in the order of label_fields.py
    std::int64_t* argmax;  // (row_count), or null: no moments
    float* masses;         // (row_count, tiles): the written row's sum over each tile; or null
    std::int32_t logits_dtype;
    std::int32_t out_dtype;  // a float16 row is multiplied with a power of two, which is a field
};
FASTFORGET_API std::int32_t fastforget_label_rows(const FastforgetLabelRows* arguments);

// What is known of a row's softmax after some of its logits. `mean` and the like are of the other tokens than the label.
struct FastforgetLabelState {
    double total = 0.0;           // of e^(z - top)
    double mean = 0.0;            // of z - top, weighted
    double deviations = 0.0;      // summed squared deviations from it, weighted
    double plain = 0.0;           // the sum of all tokens' logits
    std::int64_t best_index = 0;  // of the largest of all tokens
    float best = -INFINITY;
    float top = -INFINITY;  // the largest of the others
    float label_logit = 0.0f;  // once its block was seen; of a whole row it is set apart
    float unused = 0.0f;
};

// The same pass a tile of vocabulary after the other, so that no row of logits is ever whole. `common.vocabulary` and
// `tile` are the tile's, `common.bias` and `labels` those of the whole vocabulary. The products become weights
// e^(z - top), 0 at the label, where `top` is the largest logit of the other tokens so far; where a row's rises, what its
// earlier weights have added up to in `grad` is brought down to it.
struct FastforgetLabelTile {
    FastforgetCommon common;
    std::int64_t whole;         // the whole vocabulary
    float* tile;                // (row_count, vocabulary)
    std::int64_t tile_stride;   // at least `vocabulary` brought up to a multiple of 16, which rows are overwritten up to
    std::int64_t first_column;  // of the tile; 0: the states are begun
    const std::int64_t* labels;
    FastforgetLabelState* states;  // (row_count)
    float* grad;                   // (row_count, width), or null: at the first tile nothing has been added up
    std::int64_t grad_stride;
    std::int64_t width;
    std::int32_t write;    // 0: nothing is wanted but the states, and `tile` is left as anything
    std::int32_t moments;  // whether the fields of the pass with argmax are wanted
};
FASTFORGET_API std::int32_t fastforget_label_tile(const FastforgetLabelTile* arguments);

// After the last tile: the fields, and `grad` as scale / total of what it was: softmax over the others, times scale * W.
struct FastforgetLabelEnd {
    FastforgetCommon common;  // `vocabulary`: the whole one
    const FastforgetLabelState* states;
    float* fields;         // (12, row_count)
    std::int64_t* argmax;  // (row_count), or null
    float* grad;           // (row_count, width), or null
    std::int64_t grad_stride;
    std::int64_t width;
};
FASTFORGET_API std::int32_t fastforget_label_end(const FastforgetLabelEnd* arguments);

// Policy and reference side by side, float32. kind: 0 forward KL, 1 reverse KL, 2 JSD.
struct FastforgetPairedRows {
    FastforgetCommon common;
    const float* policy;
    std::int64_t policy_stride;
    const float* reference;
    std::int64_t reference_stride;
    float* out;  // or null; may be `policy`
    std::int64_t out_stride;
    float* values;               // (row_count)
    const std::int64_t* labels;  // (row_count), or null; a negative one is none
    float label_shift;           // added to the reference's logit of each label
    std::int32_t kind;
};
FASTFORGET_API std::int32_t fastforget_paired_rows(const FastforgetPairedRows* arguments);

// The gradient over the logits for any mix of upstream gradients; kernels/gradient_rows.py has the formula.
struct FastforgetGradientRows {
    FastforgetCommon common;
    const float* logits;
    std::int64_t logits_stride;
    const std::int64_t* labels;
    const std::int64_t* argmax;  // or null
    const float* projected;      // (row_count, vocabulary), or null
    std::int64_t projected_stride;
    const float* coefficients;  // (6, row_count): lse, unit, entropy, label_logit, max_logit, logit_mean
    float* out;                 // may be `logits`
    std::int64_t out_stride;
};
FASTFORGET_API std::int32_t fastforget_gradient_rows(const FastforgetGradientRows* arguments);

// Hidden states (row_count, vocabulary = their width) against an anchor and the nearest of centres.
struct FastforgetStateRows {
    FastforgetCommon common;
    const void* hidden;
    std::int64_t hidden_stride;
    const float* anchor;  // or null
    std::int64_t anchor_stride;
    const float* centres;  // (centre_count, width), of length 1 or 0 where the metric is the cosine; or null
    std::int64_t centre_count;
    float* values;          // (2, row_count): distance, pull
    std::int64_t* nearest;  // (row_count)
    std::int32_t hidden_dtype;
    std::int32_t cosine;
};
FASTFORGET_API std::int32_t fastforget_state_rows(const FastforgetStateRows* arguments);

// Which rows need which tiles of vocabulary, as lists for the second product: a row needs a tile where its mass times its
// factor is not below `limit` (NaN is not), or its label is there. Rows that need more than `dense` tiles need all.
struct FastforgetLiveTiles {
    std::int64_t row_count;
    std::int64_t tile_count;
    const float* masses;  // (row_count, tile_count)
    const std::int64_t* labels;
    const float* factor;  // (row_count), or null: 1
    float limit;
    std::int64_t dense;
    std::int64_t* dense_rows;    // (row_count): those that need all, in order
    std::int64_t* dense_count;   // (1)
    std::int64_t* tile_rows;     // (row_count * tile_count): of the others, the rows that need tile 0, tile 1, ...
    std::int64_t* tile_offsets;  // (tile_count + 1): where each tile's rows begin
    float* dropped;              // (row_count): the mass that the other tiles hold
};
FASTFORGET_API std::int32_t fastforget_live_tiles(const FastforgetLiveTiles* arguments);

// Adds scale * (rows over tile) x (weight over tile) to `out` (rows, width), for each tile and the rows listed for it.
// common.row_count is the number of rows of `rows` and `out`.
struct FastforgetTileProduct {
    FastforgetCommon common;
    const float* rows;  // (row_count, vocabulary)
    std::int64_t rows_stride;
    const void* weight;  // (vocabulary, width)
    std::int64_t weight_stride;
    std::int64_t width;
    std::int64_t tile_count;
    const std::int64_t* tile_rows;
    const std::int64_t* tile_offsets;
    float* out;
    std::int64_t out_stride;
    std::int32_t weight_dtype;
};
FASTFORGET_API std::int32_t fastforget_tile_product(const FastforgetTileProduct* arguments);
