// out[M, N] = epilogue(x[M, K] · w[N, K]ᵀ) for many rows on Hopper.
//
// A tile is 64 CONSUMERS rows by 128 rows of w (for GATED 64 gate rows and the same 64 up rows). One
// warp fetches: the copy engine fills a ring of stages, each 64 k of both operands. Each group of
// four warps multiplies 64 rows and keeps two sums, of the slice of k and of the slices before.
//
// The order of every sum is linear.cuh's. Where tiles are too few to keep the chip's memory busy, the
// slices are split over a cluster of SPLIT blocks; each sums its slices by themselves, and then every
// block adds all slices of its part of the tile, out of the others' shared memory.
//
// N >= 16, K a multiple of 64. -D: CONSUMERS (1, 2), STAGES, SPLIT (1, 4, 8), EPILOGUE.
#include "hopper.cuh"
#include "linear.cuh"

#define ROWS (CONSUMERS * 64)
#define FEATURES 128
#define COLUMNS (FEATURES / PAIR)
#define ROW_BYTES 128
#define STAGE ((ROWS + FEATURES) * ROW_BYTES)
#define BAND 8
#define OWN_SLICES (SLICES / SPLIT)
// Of a row of a slice's sums: so that the rows which a warp stores together touch all banks.
#define SUM_STRIDE (FEATURES + 8)
#define SUMS (SPLIT == 1 ? 0 : OWN_SLICES * ROWS * SUM_STRIDE * 4)
#define RING (STAGES * STAGE > SUMS ? STAGES * STAGE : SUMS)   // sums follow where operands were

ENTRY void CLUSTER(SPLIT) __launch_bounds__(CONSUMERS * 128 + 32, 1)
    linear_wgmma(const void* x_map, const void* w_map, const elem* __restrict__ bias,
                 const elem* residual, void* out, int M, int N, int K) {
  DYNAMIC_SHARED(memory);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  unsigned char* ring = memory + (-(long long)memory & 1023);
  u64* full = (u64*)(ring + RING);
  u64* empty = full + STAGES;

  let_next_start();
  const int half = N / PAIR;                 // output columns
  const int down = (M + ROWS - 1) / ROWS, across = (half + COLUMNS - 1) / COLUMNS;
  const int tiles = down * across, chunks = K / 64;
  const int rank = blockIdx.x % SPLIT, start = blockIdx.x / SPLIT, stride = gridDim.x / SPLIT;
  const int chunk_begin = slice_begin(rank * OWN_SLICES, chunks);
  const int chunk_end = slice_begin((rank + 1) * OWN_SLICES, chunks);
  // BAND tiles of columns go through all rows before the next ones: w is read once, x from L2.
  auto place = [&](int tile, int& row, int& column) {
    const int band = tile / (BAND * down), in = tile % (BAND * down);
    const int width = min(across - band * BAND, BAND);
    column = (band * BAND + in % width) * COLUMNS;
    row = in / width * ROWS;
  };
  if (tid == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, CONSUMERS * 4);
    }
    barrier_init_done();
  }
  BARRIER_BLOCK();

  if (warp == CONSUMERS * 4) {
    if (lane > 0) return;
    auto fetch_x = [&](int slot, int row, int c) {
      copy_tile(ring + slot * STAGE, x_map, c * 64, row, full + slot);
    };
    auto fetch_w = [&](int slot, int column, int c) {
      unsigned char* to = ring + slot * STAGE + ROWS * ROW_BYTES;
      barrier_expect(full + slot, STAGE);
      copy_tile(to, w_map, c * 64, column, full + slot);
      if (EPILOGUE == GATED)
        copy_tile(to + FEATURES / 2 * ROW_BYTES, w_map, c * 64, half + column, full + slot);
    };
    int row, column, slot = 0, phase = 1, ahead = 0;
    if (start < tiles) {
      // w needs nothing that another kernel makes.
      place(start, row, column);
      ahead = min(STAGES, chunk_end - chunk_begin);
      for (int i = 0; i < ahead; ++i) fetch_w(i, column, chunk_begin + i);
    }
    wait_for_previous();
    for (int tile = start; tile < tiles; tile += stride) {
      place(tile, row, column);
      for (int c = chunk_begin; c < chunk_end; ++c) {
        if (ahead > 0) --ahead;
        else {
          barrier_wait(empty + slot, phase);
          fetch_w(slot, column, c);
        }
        fetch_x(slot, row, c);
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
    }
    return;
  }

  wait_for_previous();
  const int own = warp / 4 * 64, g = lane >> 2, t = lane & 3;
  int slot = 0, phase = 0;
#pragma unroll 1
  for (int tile = start; tile < tiles; tile += stride) {
    int row, column;
    place(tile, row, column);
    float total[64], sum[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) total[i] = 0.f;
#pragma unroll 1
    for (int slice = rank * OWN_SLICES; slice < (rank + 1) * OWN_SLICES; ++slice) {
      const int begin = slice_begin(slice, chunks), end = slice_begin(slice + 1, chunks);
      if (begin == end) continue;
      int before = slot;
#pragma unroll 1
      for (int c = begin; c < end; ++c) {
        const Operand a = operand(ring + slot * STAGE + own * ROW_BYTES);
        const Operand b = operand(ring + slot * STAGE + ROWS * ROW_BYTES);
        barrier_wait(full + slot, phase);
        product_begin();
#pragma unroll
        for (int step = 0; step < 4; ++step) product(sum, a + step * 32, b + step * 32, step > 0 || c > begin);
        product_commit();
        product_wait<1>();
        if (c > begin && lane == 0) barrier_arrive(empty + before);
        before = slot;
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
      product_wait<0>();
      if (lane == 0) barrier_arrive(empty + before);
#if SPLIT == 1
#pragma unroll
      for (int i = 0; i < 64; ++i) total[i] += sum[i];
#elif OWN_SLICES == 2
      if (slice % OWN_SLICES == 0)
#pragma unroll
        for (int i = 0; i < 64; ++i) total[i] = sum[i];
#endif
    }

#if SPLIT > 1
    some_meet<CONSUMERS * 128>();   // all have read the operands
    auto keep = [&](int slice, const float (&from)[64]) {
      float* to = (float*)ring + (slice * ROWS + own + warp % 4 * 16 + g) * SUM_STRIDE + t * 2;
#pragma unroll
      for (int i = 0; i < 64; i += 2)
        *(float2*)(to + i / 2 % 2 * 8 * SUM_STRIDE + i / 4 * 8) = make_float2(from[i], from[i + 1]);
    };
    if (OWN_SLICES == 2) keep(0, total);
    keep(OWN_SLICES - 1, sum);
    cluster_meet();
    // Eight columns of one row at a time.
    const int units = ROWS * COLUMNS / 8, per_row = COLUMNS / 8;
#pragma unroll 1
    for (int unit = rank * units / SPLIT + tid; unit < (rank + 1) * units / SPLIT; unit += CONSUMERS * 128) {
      const int at_row = unit / per_row, at_column = unit % per_row * 8;
      float y[PAIR][8];
#pragma unroll
      for (int p = 0; p < PAIR; ++p) {
#pragma unroll
        for (int i = 0; i < 8; ++i) y[p][i] = 0.f;
        const float4* from = (const float4*)((float*)ring + at_row * SUM_STRIDE + p * COLUMNS + at_column);
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
          if (slice_begin(slice, chunks) == slice_begin(slice + 1, chunks)) continue;
          const float4* own_place = from + slice % OWN_SLICES * ROWS * SUM_STRIDE / 4;
          const float4 low = load_remote(own_place, slice / OWN_SLICES);
          const float4 high = load_remote(own_place + 1, slice / OWN_SLICES);
          const float s[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int i = 0; i < 8; ++i) y[p][i] += s[i];
        }
      }
      const int to_row = row + at_row, at = column + at_column;
      if (to_row >= M || at >= half) continue;
      const size_t place = (size_t)to_row * half + at;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int known = min(at + i, half - 1);
        if (bias) y[0][i] += to_float(bias[known]);
#if EPILOGUE == GATED
        if (bias) y[1][i] += to_float(bias[half + known]);
        y[0][i] = gated(y[0][i], y[1][i]);
#endif
      }
#if EPILOGUE == STORE_FLOAT
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (at + i < half) ((float*)out)[place + i] = y[0][i];
#else
      u32 p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) p[i] = pack(y[0][2 * i], y[0][2 * i + 1]);
      store((elem*)out, place, p, at, half, residual, load_residual(residual, place, half));
#endif
    }
    cluster_meet();   // nobody leaves while others read what it summed
#else
    row += own + warp % 4 * 16 + g;
#pragma unroll
    for (int h = 0; h < 2; ++h, row += 8) {
#if EPILOGUE == STORE_FLOAT
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = column + j * 8 + t * 2 + i;
          if (row < M && at < half)
            ((float*)out)[(size_t)row * half + at] = total[j * 4 + h * 2 + i] + (bias ? to_float(bias[at]) : 0.f);
        }
#else
#pragma unroll
      for (int quad = 0; quad < COLUMNS / 32; ++quad) {
        u32 p[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int j = quad * 4 + n, at = column + j * 8 + t * 2;
          float y[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int known = min(at + i, half - 1);
            y[i] = total[j * 4 + h * 2 + i];
            if (bias) y[i] += to_float(bias[known]);
#if EPILOGUE == GATED
            float up = total[(j + 8) * 4 + h * 2 + i];
            if (bias) up += to_float(bias[half + known]);
            y[i] = gated(y[i], up);
#endif
          }
          p[n] = pack(y[0], y[1]);
        }
        // A lane then has eight columns of one row.
        transpose(p, t);
        const int at = column + (quad * 4 + t) * 8;
        if (row >= M || at >= half) continue;
        const size_t place = (size_t)row * half + at;
        store((elem*)out, place, p, at, half, residual, load_residual(residual, place, half));
      }
#endif
    }
#endif
  }
}
