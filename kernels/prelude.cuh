// What every kernel here stands on: the element type, and one function for each
// machine instruction that C++ has no word for. No header of the toolkit is
// included, so that NVRTC needs nothing but itself.
//
// Set by the compiler's command line: BF16 (1: bfloat16, 0: float16) and ARCH
// (the compute capability times ten that the code is for). A host build that
// stands in for the device replaces this file's lower half (tests/kernels).
#pragma once

typedef unsigned short elem;    // bits of one bfloat16 or float16
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef HOST_EMULATION

#define DEVICE static __device__ __forceinline__
#define ENTRY extern "C" __global__
#define CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#define BARRIER_BLOCK() __syncthreads()
#define BARRIER_WARP() __syncwarp()
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE float to_float(elem v) {
#if BF16
  return __uint_as_float((u32)v << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#endif
}

DEVICE elem from_float(float f) {
  elem v;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
#endif
  return v;
}

// Two floats, rounded and packed: `low` in the lower half.
DEVICE u32 pack(float low, float high) {
#if BF16
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
#else
  return (u32)from_float(low) | ((u32)from_float(high) << 16);
#endif
}

// d += a(16 x 16) b(16 x 8); a by rows, b by columns, float32 accumulators.
DEVICE void mma(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3,
                u32 b0, u32 b1) {
#if ARCH >= 80
#if BF16
#define MMA_NAME "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define MMA_NAME "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif
  asm(MMA_NAME " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
               : "r"(a0), "r"(a1), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
               : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void ldmatrix(u32& r0, u32& r1, u32& r2, u32& r3, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(shared_address(row)) : "memory");
}

DEVICE void ldmatrix_transposed(u32& r0, u32& r1, u32& r2, u32& r3, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(shared_address(row)) : "memory");
}

// 16 bytes from device memory to shared memory; `valid` false writes zeros.
#if ARCH >= 80
DEVICE void copy16(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::64B [%0], [%1], 16, %2;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#else
DEVICE void copy16(void* to, const void* from, bool valid) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (valid) asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                          : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  *(uint4*)to = v;
}
DEVICE void copy_commit() {}
template <int PENDING> DEVICE void copy_wait() {}
#endif

// 16 constant bytes: weights and tables, never written while a kernel runs.
DEVICE uint4 load_constant(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Values that an earlier kernel wrote are read past the L1 cache: under programmatic
// dependent launch this kernel may have started before they were written.
DEVICE uint4 load_fresh(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE u32 load_fresh(const u32* p) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
DEVICE int load_fresh(const int* p) { return (int)load_fresh((const u32*)p); }
DEVICE float load_fresh(const float* p) { return __uint_as_float(load_fresh((const u32*)p)); }
DEVICE elem load_fresh(const elem* p) {
  elem v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
DEVICE long long load_fresh(const long long* p) {
  long long v;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}

// Programmatic dependent launch (Hopper on; nothing elsewhere). `wait_for_previous`
// returns when the kernel before this one is complete and its writes can be seen;
// `let_next_start` allows the next kernel's blocks to be placed beside this one's.
DEVICE void wait_for_previous() {
#if ARCH >= 90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#if ARCH >= 90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename V> DEVICE V shuffle_xor(V v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <typename V> DEVICE V shuffle_up(V v, int delta) {
  return __shfl_up_sync(0xffffffffu, v, delta);
}
template <typename V> DEVICE V shuffle(V v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Within one unit in the last place; subnormal numbers count as zero.
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// What p points at, of this thread's own, stays out of the registers.
DEVICE void keep_in_memory(void* p) { asm volatile("" ::"l"(p) : "memory"); }

#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#define INFINITE __int_as_float(0x7f800000)

#endif  // HOST_EMULATION

DEVICE float low_float(u32 v) { return to_float((elem)(v & 0xffffu)); }
DEVICE float high_float(u32 v) { return to_float((elem)(v >> 16)); }
DEVICE float round_elem(float f) { return to_float(from_float(f)); }

// Word i of lane t becomes word t of lane i, among four lanes that stand together.
[[maybe_unused]] DEVICE void transpose(u32 (&p)[4], int t) {
#pragma unroll
  for (int m = 1; m < 4; m *= 2) {
    const bool high = t & m;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(i & m)) {
        const u32 other = shuffle_xor(high ? p[i] : p[i + m], m);
        if (high) p[i] = other;
        else p[i + m] = other;
      }
  }
}
