// The C ABI of fastforget's CPU library. Loaded by path with ctypes: see fastforget/backends/native/library.py, whose structures
// mirror these field by field.
//
// The passes are those of fastforget/backends/protocol.py, which says what each means. Matrices have the elements of a row
// side by side and any stride (in elements) between rows. Offsets are 64-bit throughout. Nothing here allocates what it
// returns, throws, or keeps a pointer.
#pragma once

#include <cmath>
#include <cstdint>

// Raised whenever a function below changes its meaning or its arguments; library.py refuses a library of another number.
#define FASTFORGET_ABI_VERSION 6

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

// How rows are worked on. `instruction_set`: the name's place in ("scalar", "avx2", "avx512"), brought down to what the
// machine has.
struct FastforgetRows {
    std::int64_t count;
    std::int32_t threads;
    std::int32_t instruction_set;
};

// Where a tile lies in the vocabulary, and how its products become logits: z = scale * product + bias, then
// softcap * tanh(z / softcap) where softcap > 0. What lies past `columns` in a row is neither read nor written.
struct FastforgetTile {
    FastforgetRows rows;
    std::int64_t first;
    std::int64_t columns;
    std::int64_t vocabulary;
    const float* bias;  // (vocabulary) or null
    float scale;
    float softcap;
};

// Accumulators are (names, rows of the block) in the order of protocol.py; those of one name lie side by side.

struct FastforgetLabelTile {
    FastforgetTile tile;
    const void* product;  // (rows, columns), of product_dtype
    std::int64_t product_stride;
    float* rows;  // (rows, columns), or null; may be `product`
    std::int64_t rows_stride;
    const std::int64_t* labels;
    double* accumulators;
    std::int64_t accumulators_stride;
    float* grad;  // (rows, width), or null
    std::int64_t grad_stride;
    std::int64_t width;
    std::int32_t product_dtype;
    std::int32_t moments;  // whether there are accumulators past the basic four
};
FASTFORGET_API std::int32_t fastforget_label_tile(const FastforgetLabelTile* arguments);

struct FastforgetPairedTile {
    FastforgetTile tile;
    const void* policy;
    std::int64_t policy_stride;
    const void* reference;
    std::int64_t reference_stride;
    float* rows;  // or null; may be `policy`
    std::int64_t rows_stride;
    float* reference_rows;  // or null; may be `reference`
    std::int64_t reference_rows_stride;
    const std::int64_t* labels;  // negative: none
    double* accumulators;
    std::int64_t accumulators_stride;
    const float* shift;  // (rows), or null: chosen here
    float* grad;         // (rows, width), or null
    std::int64_t grad_stride;
    float* reference_grad;  // the same
    std::int64_t reference_grad_stride;
    std::int64_t width;
    std::int32_t policy_dtype;
    std::int32_t reference_dtype;
};
FASTFORGET_API std::int32_t fastforget_paired_tile(const FastforgetPairedTile* arguments);

// kind: 0 reverse KL, 1 JSD
struct FastforgetCoupledTile {
    FastforgetTile tile;
    const void* policy;
    std::int64_t policy_stride;
    const void* reference;
    std::int64_t reference_stride;
    float* rows;  // or null; may be `policy`
    std::int64_t rows_stride;
    float* policy_rows;  // or null; may be `reference`
    std::int64_t policy_rows_stride;
    const std::int64_t* labels;  // negative: none
    const float* normalisers;    // (6, rows)
    double* accumulators;
    std::int64_t accumulators_stride;
    std::int32_t policy_dtype;
    std::int32_t reference_dtype;
    std::int32_t kind;
};
FASTFORGET_API std::int32_t fastforget_coupled_tile(const FastforgetCoupledTile* arguments);

struct FastforgetGradientTile {
    FastforgetTile tile;
    const void* product;
    std::int64_t product_stride;
    const void* projected;  // or null
    std::int64_t projected_stride;
    void* rows;  // may be `product`, in the same dtype
    std::int64_t rows_stride;
    const std::int64_t* labels;
    const std::int64_t* argmax;  // -1: none
    const float* coefficients;   // (12, rows)
    std::int32_t product_dtype;
    std::int32_t projected_dtype;
    std::int32_t rows_dtype;
};
FASTFORGET_API std::int32_t fastforget_gradient_tile(const FastforgetGradientTile* arguments);

// Hidden states (rows, width) against an anchor and the nearest of centres.
struct FastforgetStateRows {
    FastforgetRows rows;
    std::int64_t width;
    const void* states;
    std::int64_t states_stride;
    const float* anchor;  // (rows, width), or null
    std::int64_t anchor_stride;  // 0: one for all rows
    const float* centres;  // (centre_count, width), of length 1 or 0 where the metric is the cosine; or null
    std::int64_t centre_count;
    float* values;  // (2, rows): distance, pull
    std::int64_t values_stride;
    std::int64_t* nearest;  // (rows)
    std::int32_t states_dtype;
    std::int32_t cosine;
};
FASTFORGET_API std::int32_t fastforget_state_rows(const FastforgetStateRows* arguments);
