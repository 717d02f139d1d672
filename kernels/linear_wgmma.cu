// out[M, N] = epilogue(x[M, K] · w[N, K]ᵀ) for many rows on Hopper.
//
// A tile is 64 CONSUMERS rows by 128 rows of w (for GATED 64 gate rows and the same 64 up rows). One
// warp fetches: the copy engine fills a ring of stages, each 64 k of both operands. Each group of
// four warps multiplies 64 rows and keeps two sums, of the slice of k and of the slices before.
//
// The order of every sum is linear.cuh's.
//
// N >= 16, K a multiple of 64. -D: CONSUMERS (1, 2), STAGES, EPILOGUE.
#include "hopper.cuh"
#include "linear.cuh"

#define ROWS (CONSUMERS * 64)
#define FEATURES 128
#define COLUMNS (FEATURES / PAIR)
#define ROW_BYTES 128
#define STAGE ((ROWS + FEATURES) * ROW_BYTES)
#define BAND 8

ENTRY void __launch_bounds__(CONSUMERS * 128 + 32, 1)
    linear_wgmma(const void* x_map, const void* w_map, const elem* __restrict__ bias,
                 const elem* residual, void* out, int M, int N, int K) {
  DYNAMIC_SHARED(memory);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  unsigned char* ring = memory + (-(long long)memory & 1023);
  u64* full = (u64*)(ring + STAGES * STAGE);
  u64* empty = full + STAGES;

  let_next_start();
  const int half = N / PAIR;                 // output columns
  const int down = (M + ROWS - 1) / ROWS, across = (half + COLUMNS - 1) / COLUMNS;
  const int tiles = down * across, chunks = K / 64;
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
    if (blockIdx.x < tiles) {
      // w needs nothing that another kernel makes.
      place(blockIdx.x, row, column);
      ahead = min(STAGES, chunks);
      for (int c = 0; c < ahead; ++c) fetch_w(c, column, c);
    }
    wait_for_previous();
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      place(tile, row, column);
      for (int c = 0; c < chunks; ++c) {
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
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int row, column;
    place(tile, row, column);
    float total[64], sum[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) total[i] = 0.f;
#pragma unroll 1
    for (int slice = 0; slice < SLICES; ++slice) {
      const int begin = slice_begin(slice, chunks), end = slice_begin(slice + 1, chunks);
      if (begin == end) continue;
      int before = slot;
#pragma unroll 1
      for (int c = begin; c < end; ++c) {
        const unsigned char* a = ring + slot * STAGE + own * ROW_BYTES;
        const unsigned char* b = ring + slot * STAGE + ROWS * ROW_BYTES;
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
#pragma unroll
      for (int i = 0; i < 64; ++i) total[i] += sum[i];
    }

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
  }
}
