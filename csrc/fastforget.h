// The C ABI of fastforget's CPU library. Loaded by path with ctypes: see fastforget/backends/native/library.py, whose
// structures mirror these field by field.
//
// The passes are those of fastforget/backends/protocol.py, which says what each means. Matrices have the elements of a
// row side by side and any stride (in elements) between rows. Offsets are 64-bit throughout. Nothing here allocates
// what it returns, throws, or keeps a pointer.
#pragma once

#include <cstdint>

// Raised whenever a function below changes its meaning or its arguments; library.py refuses a library of another one.
#define FASTFORGET_ABI_VERSION 7

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

// What a pass returns. Everything is looked at, labels and argmax too, before anything is written.
enum FastforgetResult : std::int32_t {
    FASTFORGET_OK = 0,
    FASTFORGET_BAD_INDEX = 1,     // a label (or argmax) outside the vocabulary
    FASTFORGET_BAD_ARGUMENT = 2,  // an unknown dtype, pass or instruction set, a negative size, rows that overlap
};

// A matrix; `data` null: none
struct FastforgetRows {
    void* data;
    std::int64_t stride;  // in elements
    std::int64_t dtype;   // FastforgetDtype
};

enum FastforgetPass : std::int32_t {
    FASTFORGET_LABEL,
    FASTFORGET_LABEL_MOMENTS,
    FASTFORGET_PAIRED,
    FASTFORGET_REVERSE_KL,  // of the coupled pass
    FASTFORGET_JSD,
    FASTFORGET_GRADIENT,
    FASTFORGET_PASS_COUNT,
};

// What a pass over a tile is given; what it has no use for is null or 0. Logits are z = scale * product + bias, then
// softcap * tanh(z / softcap) where softcap > 0. `instruction_set`: the name's place in ("scalar", "avx2", "avx512"),
// brought down to what the machine has.
struct FastforgetTile {
    std::int64_t row_count;
    std::int64_t first;  // column of the vocabulary that the tile begins at
    std::int64_t columns;
    std::int64_t vocabulary;
    std::int64_t padded;  // elements of each row of a matrix that may be read and written; at least `columns`
    const float* bias;    // (vocabulary) or null
    float scale;
    float softcap;
    std::int32_t threads;
    std::int32_t instruction_set;
    FastforgetRows products[2];  // the logits', of a pair the policy's first; of the gradient pass logits and projected
    FastforgetRows rows[2];      // what is written; each may be the product beside it, as far as elements are no wider
    const std::int64_t* labels;  // a negative one is none (label and gradient passes: refused)
    const std::int64_t* argmax;  // -1: none
    double* accumulators;
    std::int64_t accumulators_stride;
    const float* given;       // row_count of each: COUPLED_NORMALISERS, GRADIENT_COEFFICIENTS, or the shift
    FastforgetRows grads[2];  // (row_count, width) float32, what product 2 has added up to; null where `first` is 0
    std::int64_t width;
};
FASTFORGET_API std::int32_t fastforget_tile(std::int32_t pass, const FastforgetTile* arguments);
