// out[row] = weight * x[row] / rms(x[row]), one warp a row, for batches of too many rows to
// fold it into the linear layer. The sum of squares runs in linear.cu's order: lane 4 w + t
// adds what thread t of warp w adds there, so the bits are the same on both ways.
#include "prelude.cuh"

ENTRY void __launch_bounds__(32)
    rms_norm(const elem* __restrict__ x, const elem* __restrict__ weight, elem* out, int K, float eps) {
  let_next_start();
  wait_for_previous();
  const int lane = threadIdx.x, w = lane >> 2, t = lane & 3, chunks = K / 64;
  x += (size_t)blockIdx.x * K;
  out += (size_t)blockIdx.x * K;
  float square = 0.f;
#pragma unroll 4
  for (int c = w * chunks / 8; c < (w + 1) * chunks / 8; ++c)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 v = load_fresh((const uint4*)(x + c * 64 + h * 32 + t * 8));
      const u32 p[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        square = fmaf(low_float(p[i]), low_float(p[i]), square);
        square = fmaf(high_float(p[i]), high_float(p[i]), square);
      }
    }
  square += shuffle_xor(square, 1);
  square += shuffle_xor(square, 2);
  float s = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) s += shuffle(square, i * 4);
  const float scale = rsqrtf(s / (float)K + eps);
#pragma unroll 4
  for (int i = lane; i < K / 8; i += 32) {
    const uint4 v = load_fresh((const uint4*)x + i), q = *((const uint4*)weight + i);
    const u32 n[4] = {q.x, q.y, q.z, q.w};
    u32 p[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      p[j] = pack(low_float(n[j]) * round_elem(low_float(p[j]) * scale),
                  high_float(n[j]) * round_elem(high_float(p[j]) * scale));
    ((uint4*)out)[i] = make_uint4(p[0], p[1], p[2], p[3]);
  }
}
