// Which instruction set the CPU kernels use, chosen when they run: one build serves every x86-64 machine, and others.

#include "tile_passes.h"

#include <algorithm>
#include <cstring>

namespace {

// From least to most, so that the smaller of two is what both allow.
enum InstructionSet { scalar, avx2, avx512, instruction_set_count };

constexpr const char* names[instruction_set_count] = {"scalar", "avx2", "avx512"};

// GCC and Clang compile one function for several instruction sets (`__attribute__((target))`) and also ask the operating
// system whether it saves the wide registers. MSVC has no such attribute, so there, as on ARM, kernels are scalar.
InstructionSet best_supported() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return scalar;  // AVX2 brings F16C along
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return has_avx512 ? avx512 : avx2;
#else
    return scalar;
#endif
}

}  // namespace

const fastforget::TilePasses* fastforget::passes_of(std::int32_t instruction_set) {
    if (instruction_set < scalar || instruction_set >= instruction_set_count) return nullptr;
    switch (std::min<int>(instruction_set, best_supported())) {
#ifdef FASTFORGET_X86
        case avx512: return &avx512_passes;
        case avx2: return &avx2_passes;
#endif
        default: return &scalar_passes;
    }
}

std::int32_t fastforget_abi_version() { return FASTFORGET_ABI_VERSION; }

const char* fastforget_instruction_set(const char* requested) {
    const InstructionSet best = best_supported();
    if (requested == nullptr) return names[best];
    for (int candidate = scalar; candidate < instruction_set_count; ++candidate) {
        if (std::strcmp(requested, names[candidate]) == 0) {
            return names[std::min<int>(candidate, best)];
        }
    }
    return names[best];
}
