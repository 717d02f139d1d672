// out[M, N] = epilogue(x[M, K] · w[N, K]ᵀ) for many rows on Hopper.
//
// A tile is 64 CONSUMERS rows by 128 rows of w (for GATED 64 gate rows and the same 64 up rows). One
// warp fetches: the copy engine fills a ring of stages, each 64 k of both operands. Each group of
// four warps multiplies 64 rows and keeps three sums: of the slices before and, in turn, of two
// slices. Products are always under way: those of a slice while the one before is added, those of the
// next tile while one is finished and stored.
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

ENTRY void CLUSTER(SPLIT) __launch_bounds__(CONSUMERS == 1 ? 160 : 384, 1)
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
  const int tiles = down * across;
  const int rank = blockIdx.x % SPLIT, start = blockIdx.x / SPLIT, stride = gridDim.x / SPLIT;
  // Each slice has two chunks at least, so that what is under way depends on nothing but the place in
  // the program; those that k is too short for are zeros, from beyond the matrix.
  const int real = K / 64, chunks = max(real, 2 * SLICES);
  auto k_of = [&](int c) {
    if (real >= 2 * SLICES) return c * 64;
    const int own = slice_begin(c / 2, real) + c % 2;
    return own < slice_begin(c / 2 + 1, real) ? own * 64 : K;
  };
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

  if (warp >= CONSUMERS * 4) {
    if (CONSUMERS == 2) give_registers<40>();
    if (tid > CONSUMERS * 128) return;
    auto fetch_x = [&](int slot, int row, int k) {
      copy_tile(ring + slot * STAGE, x_map, k, row, full + slot);
    };
    auto fetch_w = [&](int slot, int column, int k) {
      unsigned char* to = ring + slot * STAGE + ROWS * ROW_BYTES;
      barrier_expect(full + slot, STAGE);
      copy_tile(to, w_map, k, column, full + slot);
      if (EPILOGUE == GATED)
        copy_tile(to + FEATURES / 2 * ROW_BYTES, w_map, k, half + column, full + slot);
    };
    int row, column, slot = 0, phase = 1;
    // w needs nothing that another kernel makes.
    place(start, row, column);
    int ahead = min(STAGES, chunk_end - chunk_begin);
    for (int i = 0; i < ahead; ++i) fetch_w(i, column, k_of(chunk_begin + i));
    wait_for_previous();
    auto fetch = [&](int k) {
      if (ahead > 0) --ahead;
      else {
        barrier_wait(empty + slot, phase);
        fetch_w(slot, column, k);
      }
      fetch_x(slot, row, k);
      if (++slot == STAGES) slot = 0, phase ^= 1;
    };
    for (int tile = start; tile < tiles; tile += stride) {
      place(tile, row, column);
      for (int c = chunk_begin; c < chunk_end; ++c) fetch(k_of(c));
    }
    if (SPLIT == 1) fetch(K);   // zeros, for the products that begin while the last tile is finished
    return;
  }

  if (CONSUMERS == 2) take_registers<232>();
  wait_for_previous();
  const int own = warp / 4 * 64, g = lane >> 2, t = lane & 3;
  int slot = 0, phase = 0, oldest = 0;   // of the slots whose products may be under way
  // Two sums, so that the products of a slice are under way while those of the one before are added.
  float even[64], odd[64];
  auto multiply = [&](float (&sum)[64], bool first) {
    const unsigned char* a = ring + slot * STAGE + own * ROW_BYTES;
    const unsigned char* b = ring + slot * STAGE + ROWS * ROW_BYTES;
    barrier_wait(full + slot, phase);
    product_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (step == 0 && first) product_set(sum, a, b);
      else product_add(sum, a + step * 32, b + step * 32);
    }
    product_commit();
    if (++slot == STAGES) slot = 0, phase ^= 1;
  };
  auto leave = [&] {
    if (lane == 0) barrier_arrive(empty + oldest);
    if (++oldest == STAGES) oldest = 0;
  };
  // All chunks of a slice but the first, with one under way before and after. The last stands by
  // itself: the compiler sees then that only it is under way.
  auto multiply_next = [&](float (&sum)[64]) {
    multiply(sum, false);
    product_wait<1>();
    leave();
  };
  auto multiply_rest = [&](float (&sum)[64], int c, int end) {
#pragma unroll 1
    for (; c < end - 1; ++c) multiply_next(sum);
    multiply_next(sum);
  };

#if SPLIT > 1
  auto multiply_slice = [&](float (&sum)[64], int slice) {
    const int begin = slice_begin(slice, chunks), end = slice_begin(slice + 1, chunks);
    multiply(sum, true);
    multiply_rest(sum, begin + 1, end);
    product_wait<0>(sum);
    leave();
  };
#pragma unroll 1
  for (int tile = start; tile < tiles; tile += stride) {
    int row, column;
    place(tile, row, column);
    multiply_slice(even, rank * OWN_SLICES);
    if (OWN_SLICES == 2) multiply_slice(odd, rank * OWN_SLICES + 1);

    some_meet<CONSUMERS * 128>();   // all have read the operands
    auto keep = [&](int slice, const float (&from)[64]) {
      float* to = (float*)ring + (slice * ROWS + own + warp % 4 * 16 + g) * SUM_STRIDE + t * 2;
#pragma unroll
      for (int i = 0; i < 64; i += 2)
        *(float2*)(to + i / 2 % 2 * 8 * SUM_STRIDE + i / 4 * 8) = make_float2(from[i], from[i + 1]);
    };
    keep(0, even);
    if (OWN_SLICES == 2) keep(1, odd);
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
  }
#else
  float total[64];
  auto add = [&](float (&sum)[64]) {
    product_wait<1>(sum);
    leave();
#pragma unroll
    for (int i = 0; i < 64; ++i) total[i] += sum[i];
  };
  // Between the parts of a tile that is finished, chunks of the next one's first slice are multiplied:
  // this one, up to that one.
  int next = 1, most = 0;
  auto go_on = [&] {
    if (next < most) multiply_next(even), ++next;
  };
  auto finish = [&](int row, int column) {
    row += own + warp % 4 * 16 + g;
#if EPILOGUE == STORE_FLOAT
#pragma unroll
    for (int h = 0; h < 2; ++h, row += 8) {
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = column + j * 8 + t * 2 + i;
          if (row < M && at < half)
            ((float*)out)[(size_t)row * half + at] = total[j * 4 + h * 2 + i] + (bias ? to_float(bias[at]) : 0.f);
        }
      if (h == 0) go_on();
    }
#else
    // A lane stores eight columns of one row at a time; what is added to them is asked for ahead.
    const int parts = COLUMNS / 16, early = 4;
    auto row_of = [&](int part) { return row + part % 2 * 8; };
    auto column_of = [&](int part) { return column + (part / 2 * 4 + t) * 8; };
    auto in_matrix = [&](int part) { return row_of(part) < M && column_of(part) < half; };
    uint4 added[parts];
    auto ask = [&](int part) {
      if (part >= parts) return;
      const size_t known = (size_t)min(row_of(part), M - 1) * half + min(column_of(part), half - 8);
      added[part] = load_residual(residual, known, half);
    };
#pragma unroll
    for (int part = 0; part < early; ++part) ask(part);
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      ask(part + early);
      u32 p[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int j = part / 2 * 4 + n, h = part % 2, at = column + j * 8 + t * 2;
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
      transpose(p, t);
      if (in_matrix(part))
        store((elem*)out, (size_t)row_of(part) * half + column_of(part), p, column_of(part), half, residual,
              added[part]);
      if (part + 1 < parts) go_on();
    }
#endif
  };
  // The first products of a slice, or of the next tile, are under way while what came before is
  // added, or is finished.
  const int first_end = slice_begin(1, chunks);
  multiply(even, true);
#pragma unroll 1
  for (int tile = start; tile < tiles; tile += stride) {
#pragma unroll
    for (int i = 0; i < 64; ++i) total[i] = 0.f;
    multiply_rest(even, next, first_end);
#pragma unroll 1
    for (int slice = 0;; slice += 2) {
      const int middle = slice_begin(slice + 1, chunks), end = slice_begin(slice + 2, chunks);
      multiply(odd, true);
      add(even);
      multiply_rest(odd, middle + 1, end);
      multiply(even, true);
      add(odd);
      if (slice + 2 == SLICES) break;
      multiply_rest(even, end + 1, slice_begin(slice + 3, chunks));
    }
    int row, column;
    place(tile, row, column);
    next = 1;
    most = tile + stride < tiles ? first_end - 1 : 0;
    finish(row, column);
  }
  product_wait<0>();
#endif
}
