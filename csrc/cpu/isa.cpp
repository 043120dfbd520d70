#include "isa.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastmaf {

namespace {

struct Isa {
    const char* name;
    bool (*runs)();
    const Kernels<float>* f32;
    const Kernels<double>* f64;
};

// The builtins ask the operating system too (xgetbv), not only the CPU.
const Isa kIsas[] = {
#ifdef FASTMAF_HAS_X86
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
     },
     &avx512::kernels_f32, &avx512::kernels_f64},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, &avx2::kernels_f32, &avx2::kernels_f64},
#endif
    {"baseline", [] { return true; }, &baseline::kernels_f32, &baseline::kernels_f64},
};

std::atomic<const Isa*> chosen{nullptr};

const Isa& find(const std::string& name) {
    std::string names;
    for (const Isa& isa : kIsas) {
        if (!isa.runs()) continue;
        if (name == isa.name) return isa;
        names += (names.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw std::invalid_argument("this CPU has no instruction set '" + name + "'; it has " + names);
}

const Isa& current() {
    if (const Isa* isa = chosen.load(std::memory_order_acquire)) return *isa;
    const char* wanted = std::getenv("FASTMAF_ISA");
    const Isa* isa = nullptr;
    if (wanted && *wanted)
        isa = &find(wanted);
    else
        for (const Isa& each : kIsas)
            if (each.runs()) {
                isa = &each;
                break;
            }
    chosen.store(isa, std::memory_order_release);
    return *isa;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas)
        if (isa.runs()) names.emplace_back(isa.name);
    return names;
}

std::string isa() { return current().name; }

void set_isa(const std::string& name) { chosen.store(&find(name), std::memory_order_release); }

template <>
const Kernels<float>& kernels<float>() {
    return *current().f32;
}
template <>
const Kernels<double>& kernels<double>() {
    return *current().f64;
}

}  // namespace fastmaf
