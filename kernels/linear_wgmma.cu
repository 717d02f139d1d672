// out[M, N] = epilogue(x[M, K] · w[N, K]ᵀ) for many rows on Hopper.
//
// A tile is 64 CONSUMERS rows by 128 rows of w (for GATED 64 gate rows and the same 64 up rows). One
// warp fetches: the copy engine fills a ring of stages, each 64 k of both operands. Each group of
// four warps multiplies 64 rows and keeps two sums, of the slice of k and of the slices before.
//
// The order of every sum is linear.cu's: k ascending within a slice by steps of 16 consecutive k,
// the eight slices one after the other. So a row has the same bits here and there.
//
// N >= 16, K a multiple of 64. -D: CONSUMERS (1, 2), STAGES, EPILOGUE.
#include "hopper.cuh"

#define STORE 0       // out = elem(y)
#define STORE_FLOAT 1 // out = float(y)
#define RESIDUAL 2    // out = residual + elem(y)
#define GATED 3       // w holds gate rows, then up rows: out = silu(gate) * up

#define ROWS (CONSUMERS * 64)
#define FEATURES 128
#define COLUMNS (EPILOGUE == GATED ? FEATURES / 2 : FEATURES)
#define ROW_BYTES 128
#define STAGE ((ROWS + FEATURES) * ROW_BYTES)
#define BAND 8

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

ENTRY void __launch_bounds__(CONSUMERS * 128 + 32, 1)
    linear_wgmma(const void* x_map, const void* w_map, const elem* __restrict__ bias,
                 const elem* residual, void* out, int M, int N, int K) {
  DYNAMIC_SHARED(memory);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  unsigned char* ring = memory + (-(long long)memory & 1023);
  u64* full = (u64*)(ring + STAGES * STAGE);
  u64* empty = full + STAGES;

  let_next_start();
  const int half = EPILOGUE == GATED ? N / 2 : N;                 // output columns
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
    for (int slice = 0; slice < 8; ++slice) {
      const int begin = slice * chunks / 8, end = (slice + 1) * chunks / 8;
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
            const float gate = round_elem(y[i]);
            y[i] = round_elem(gate / (1.f + __expf(-gate))) * round_elem(up);
#endif
          }
          p[n] = pack(y[0], y[1]);
        }
        // A lane then has eight columns of one row.
        transpose(p, t);
        const int at = column + (quad * 4 + t) * 8;
        if (row >= M || at >= half) continue;
        elem* to = (elem*)out + (size_t)row * half + at;
        [[maybe_unused]] const elem* from = residual + (size_t)row * half + at;
        if (half % 8 == 0) {
#if EPILOGUE == RESIDUAL
          const uint4 r = load_fresh((const uint4*)from);
          const u32 q[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
          for (int i = 0; i < 4; ++i)
            p[i] = pack(low_float(q[i]) + low_float(p[i]), high_float(q[i]) + high_float(p[i]));
#endif
          *(uint4*)to = make_uint4(p[0], p[1], p[2], p[3]);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (at + i < half) {
              const elem y = (elem)(p[i / 2] >> (i % 2 * 16));
#if EPILOGUE == RESIDUAL
              to[i] = from_float(to_float(load_fresh(from + i)) + to_float(y));
#else
              to[i] = y;
#endif
            }
        }
      }
#endif
    }
  }
}
