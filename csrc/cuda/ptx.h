// The instructions that C++ has no words for: asynchronous copies into shared memory, loads of matrix fragments, tensor
// cores (sm_80 and later; PTX ISA 8, "Matrix multiply-accumulate operation using mma instruction"). On the host each is
// spelt out, by the same layouts, as what a whole warp does.
#pragma once

#include "types.h"

namespace pk::cuda {

#ifndef PK_HOST

// 16 bytes; those behind the first `there` become zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, int there) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last `N` groups are there.
template <int N>
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit numbers; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ uint32_t to_tf32(uint32_t x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}

// c += a b: 16x8 += 16x16 16x8 of halves, or 16x8 8x8 of tf32.
template <Math M>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (M == Math::f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (M == Math::bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ void pause() { __nanosleep(32); }

#else

inline void copy_async(void* to, const void* from, int there) {
  host::machine().now->open.push_back({static_cast<char*>(to), static_cast<const char*>(from), 16, there});
}
inline void commit_copies() {
  host::Fiber& self = *host::machine().now;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}
template <int N>
inline void wait_copies() {
  auto& groups = host::machine().now->groups;
  while (groups.size() > size_t(N)) {
    for (const host::Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, size_t(copy.there));
      std::memset(copy.to + copy.there, 0, size_t(copy.bytes - copy.there));
    }
    groups.erase(groups.begin());
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  std::memcpy(host::slot(host::lane()), &row, sizeof row);
  __syncwarp();
  for (unsigned i = 0; i < 4; ++i) {
    const char* from;
    std::memcpy(&from, host::slot(8 * i + host::lane() / 4), sizeof from);
    std::memcpy(&r[i], from + 4 * (host::lane() % 4), 4);
  }
  __syncwarp();
}

inline uint32_t to_tf32(uint32_t x) {      // 10 bits of fraction, ties away from zero
  return (x & 0x7f800000) == 0x7f800000 ? x : (x + 0x1000) & 0xffffe000;
}

template <Math M>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t* const mine = host::slot(host::lane());
  for (int i = 0; i < 4; ++i) mine[i] = a[i];
  mine[4] = b0;
  mine[5] = b1;
  __syncwarp();
  constexpr int kDepth = M == Math::tf32 ? 8 : 16, kEach = M == Math::tf32 ? 1 : 2;
  const auto number = [](uint32_t word, int which) {
    if constexpr (M == Math::f16) return to_float(half{uint16_t(word >> 16 * which)});
    if constexpr (M == Math::bf16) return to_float(bf16{uint16_t(word >> 16 * which)});
    float y;
    std::memcpy(&y, &word, 4);
    return y;
  };
  for (int i = 0; i < 4; ++i) {
    const int row = int(host::lane()) / 4 + 8 * (i / 2), col = 2 * (int(host::lane()) % 4) + i % 2;
    for (int k = 0; k < kDepth; ++k) {
      const int four = k % (4 * kEach) / kEach, high = k / (4 * kEach);
      c[i] += number(host::slot(unsigned(row % 8 * 4 + four))[row / 8 + 2 * high], k % kEach) *
              number(host::slot(unsigned(col * 4 + four))[4 + high], k % kEach);
    }
  }
  __syncwarp();
}

inline void pause() { host::yield(); }

#endif

}  // namespace pk::cuda
