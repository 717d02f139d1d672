// What the kernels for linear layers have in common: the order of their sums, so that a row has
// the same bits from each, and what becomes of a sum.
//
// The order: K is in chunks of 64, the chunks in eight slices. Within a slice the accumulator
// starts at 0 and takes the tensor-core steps of 16 k, chunk by chunk, ascending. Then the slices
// are added one after the other, ((0+s0)+s1)+ … +s7. Which 16 k go into a step matters, their
// order in it does not: with CONSECUTIVE they are those that stand together; else a lane's
// 16 bytes of 32 k give their first half to one step and their second to the next.
#pragma once
#include "prelude.cuh"

#define STORE 0       // out = elem(y)
#define STORE_FLOAT 1 // out = float(y)
#define RESIDUAL 2    // out = residual + elem(y)
#define GATED 3       // w holds gate rows, then up rows: out = silu(gate) * up

#define PAIR (EPILOGUE == GATED ? 2 : 1)
#define SLICES 8
#define CONSECUTIVE (ARCH >= 90)

// The chunk at which a slice begins, and the one before it ends.
[[maybe_unused]] DEVICE int slice_begin(int slice, int chunks) { return slice * chunks / SLICES; }

// a / d with the bits of division, for d >= 1. What the compiler makes of division itself branches for
// each, so that those of a thread wait for one another.
[[maybe_unused]] DEVICE float quotient(float a, float d) {
  // Above 2^64 divided by 2^64, the quotient after it: else the reciprocal could be subnormal.
  const float scale = d > 0x1p64f ? 0x1p-64f : 1.f;
  const float divisor = d * scale;
  float r = reciprocal(divisor);
  const float simple = a * r;
  r = fmaf(fmaf(-divisor, r, 1.f), r, r);
  float q = a * r;
  q = fmaf(fmaf(-divisor, q, a), r, q);
  q = fmaf(fmaf(-divisor, q, a), r, q);
  // Of infinities the remainder is no number, of -0 it is +0.
  const bool finite = fabsf(a) < INFINITE && d < INFINITE;
  return finite ? copysignf(q * scale, a) : simple;
}

// Both round to elem wherever a chain of separate layers would, but for the result.
[[maybe_unused]] DEVICE float gated(float gate, float up) {
  gate = round_elem(gate);
  return round_elem(quotient(gate, 1.f + __expf(-gate))) * round_elem(up);
}
[[maybe_unused]] DEVICE float with_residual(elem residual, float y) {
  return to_float(residual) + round_elem(y);
}

// The residual of eight outputs of a row of `columns`, from index `at` of the matrix on; zeros where
// rows are not aligned to 16 bytes and `store` fetches it itself.
[[maybe_unused]] DEVICE uint4 load_residual(const elem* residual, size_t at, int columns) {
  if (EPILOGUE != RESIDUAL || columns % 8 != 0) return make_uint4(0, 0, 0, 0);
  return load_fresh((const uint4*)(residual + at));
}

// Stores eight outputs p of a row, or as many as there are before `columns` ends.
[[maybe_unused]] DEVICE void store(elem* out, size_t at, u32 (&p)[4], int column, int columns,
                                   const elem* residual, uint4 loaded) {
  if (columns % 8 == 0) {
#if EPILOGUE == RESIDUAL
    const u32 r[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      p[i] = pack(with_residual((elem)(r[i] & 0xffffu), low_float(p[i])),
                  with_residual((elem)(r[i] >> 16), high_float(p[i])));
#endif
    *(uint4*)(out + at) = make_uint4(p[0], p[1], p[2], p[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (column + i < columns) {
      const elem y = (elem)(p[i / 2] >> (i % 2 * 16));
#if EPILOGUE == RESIDUAL
      out[at + i] = from_float(with_residual(load_fresh(residual + at + i), to_float(y)));
#else
      out[at + i] = y;
#endif
    }
}
