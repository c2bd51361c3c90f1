// Rows over threads. With OpenMP they are those of torch, where torch brought the same library (libgomp.so.1): no
// second pool, and none that spins against torch's. Without it, threads are made for the call.
#pragma once

#include <cstdint>

#if !defined(_OPENMP)
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace fastforget {

#if defined(_OPENMP)
constexpr const char* threading = "openmp";
#else
constexpr const char* threading = "threads";
#endif

// body(row) for each row of 0..count-1
template <class Body>
void for_each_row(std::int64_t count, std::int64_t threads, const Body& body) {
    const std::int64_t useful = threads < count ? threads : count;
    if (useful <= 1) {
        for (std::int64_t row = 0; row < count; ++row) body(row);
        return;
    }
#if defined(_OPENMP)
    // one row at a time: whichever thread is free, as machines are shared
#pragma omp parallel for num_threads(static_cast<int>(useful)) schedule(dynamic, 1)
    for (std::int64_t row = 0; row < count; ++row) body(row);
#else
    std::atomic<std::int64_t> next{0};
    const auto work = [&] {
        for (std::int64_t row = next++; row < count; row = next++) body(row);
    };
    std::vector<std::thread> others;
    try {
        for (std::int64_t index = 1; index < useful; ++index) others.emplace_back(work);
    } catch (...) {  // no more threads to be had: those that there are do the rows
    }
    work();
    for (std::thread& other : others) other.join();
#endif
}

}  // namespace fastforget
