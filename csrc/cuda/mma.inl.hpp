// What tensor cores need beside vectors, for a GPU: fragments, copies under way, and numbers that lanes exchange. From sm_80 on.
#pragma once

#include "fragments.hpp"
#include FASTMAF_VEC

namespace fastmaf {
namespace FASTMAF_ISA {

using Half = uint16_t;

FASTMAF_INLINE Words lane_words() { return uint32_t(lane()); }
FASTMAF_INLINE Vec<float> take(const float* p, Words i) { return p[i]; }
FASTMAF_INLINE Words take(const int* p, Words i) { return uint32_t(p[i]); }
template <class T, class M>
FASTMAF_INLINE void put(T* p, Words i, T v, M where) {
    if (where) p[i] = v;
}
template <class M>
FASTMAF_INLINE Vec<float> select(M where, Vec<float> a, Vec<float> b) {
    return where ? a : b;
}
template <class M>
FASTMAF_INLINE Words select_words(M where, Words a, Words b) {
    return where ? a : b;
}
template <class M>
FASTMAF_INLINE Vec<double> select_wide(M where, Vec<double> a) {
    return where ? a : 0;
}
// p[i] becomes the least of itself and v.
template <class M>
FASTMAF_INLINE void lower(int* p, Words i, Words v, M where) {
    if (where) atomicMin(p + i, int(v));
}

// Two halves in a word.
FASTMAF_INLINE Words halves(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
FASTMAF_INLINE float low_half(Words word) {
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(value) : "r"(word));
    return value;
}
FASTMAF_INLINE float high_half(Words word) {
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(value) : "r"(word));
    return value;
}
FASTMAF_INLINE void put_halves(Half* p, Words i, Words word) { *reinterpret_cast<uint32_t*>(p + i) = word; }
template <class M>
FASTMAF_INLINE void put_halves(Half* p, Words i, Words word, M where) {
    if (where) put_halves(p, i, word);
}
template <class M>
FASTMAF_INLINE void put_half(Half* p, Words i, Words word, M where) {
    if (where) p[i] = Half(word);
}
template <class M>
FASTMAF_INLINE void put_eight(Half* p, Words i, const Words (&words)[4], M where) {
    if (where) *reinterpret_cast<uint4*>(p + i) = make_uint4(words[0], words[1], words[2], words[3]);
}
// The 16 bytes of each lane, which lie side by side.
FASTMAF_INLINE void load_four(Words (&words)[4], const char* p) {
    const uint4 own = reinterpret_cast<const uint4*>(p)[lane()];
    words[0] = own.x;
    words[1] = own.y;
    words[2] = own.z;
    words[3] = own.w;
}
FASTMAF_INLINE void take_four(Vec<float> (&values)[4], const float* p, Words i) {
    const float4 own = *reinterpret_cast<const float4*>(p + i);
    values[0] = own.x;
    values[1] = own.y;
    values[2] = own.z;
    values[3] = own.w;
}

FASTMAF_INLINE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// The 16 bytes of each lane on their way to shared memory. Copies are counted in groups.
FASTMAF_INLINE void copy_async(char* to, const char* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to) + 16 * lane()), "l"(from + 16 * lane()) : "memory");
}
FASTMAF_INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups but the last N have come.
template <int N>
FASTMAF_INLINE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// The fragment of A of the 16 x 16 halves at p, whose rows lie `stride` apart.
FASTMAF_INLINE void load_a(Words (&a)[4], const Half* p, int stride) {
    const uint32_t own = uint32_t(lane());
    const Half* const row = p + fragments::matrix_row(own) * uint32_t(stride) + fragments::matrix_column(own);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// c += a b.
FASTMAF_INLINE void multiply_add(Vec<float> (&c)[4], const Words (&a)[4], Words b0, Words b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The sum over the four lanes of a quad, in each of them.
FASTMAF_INLINE Vec<double> quad_sum(Vec<double> v) {
    v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
    return v + __shfl_xor_sync(0xFFFFFFFFu, v, 2);
}
FASTMAF_INLINE Words quad_or(Words v) {
    v |= __shfl_xor_sync(0xFFFFFFFFu, v, 1);
    return v | __shfl_xor_sync(0xFFFFFFFFu, v, 2);
}
// What lanes of the warp have written before is there for the others.
FASTMAF_INLINE void sync_warp() { __syncwarp(); }
FASTMAF_INLINE Vec<double> take_wide(const double* p, Words i) { return p[i]; }

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
