// How a thread rounds and what it makes of small numbers. Other libraries change that (flush to zero, denormals are zero, other roundings),
// and a new thread inherits it; results here must not depend on it.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastmaf {

// The IEEE defaults for the time of a scope: to nearest, denormal numbers, no traps.
class PlainFloats {
public:
    PlainFloats() : before_(get()) { set(plain()); }
    PlainFloats(const PlainFloats&) = delete;
    PlainFloats& operator=(const PlainFloats&) = delete;
    ~PlainFloats() { set(before_); }

private:
#if defined(__x86_64__)
    using Control = unsigned;
    static Control plain() { return 0x1F80; }
    static Control get() { return _mm_getcsr(); }
    static void set(Control control) { _mm_setcsr(control); }
#elif defined(__aarch64__)
    using Control = uint64_t;
    static Control plain() { return 0; }
    static Control get() {
        Control control;
        asm volatile("mrs %0, fpcr" : "=r"(control));
        return control;
    }
    static void set(Control control) { asm volatile("msr fpcr, %0" : : "r"(control) : "memory"); }
#else
    using Control = int;
    static Control plain() { return 0; }
    static Control get() { return 0; }
    static void set(Control) {}
#endif
    const Control before_;
};

}  // namespace fastmaf
