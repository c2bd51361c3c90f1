// The C ABI of fastforget's CPU library. Loaded by path with ctypes: see fastforget/backends/native.py.
#pragma once

#include <cstdint>

// Raised whenever a function below changes its meaning or its arguments; native.py refuses a library of another number.
#define FASTFORGET_ABI_VERSION 1

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
