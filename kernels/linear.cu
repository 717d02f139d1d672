// out[M, N] = epilogue(norm(x)[M, K] · w[N, K]ᵀ) for few rows (M <= 8 * GROUPS <= 64).
//
// Bound by reading w once. A block owns a contiguous range of units of eight output
// features; its eight warps share K in fixed slices, and each warp streams its slice through
// its own ring of shared memory, so no barrier of the block stands in the stream. A stage of
// the ring holds 64 k of UNITS units: 1 KiB each. w needs nothing that another kernel makes:
// the ring is filled before `wait_for_previous`.
//
// The order of every sum is linear.cuh's, one slice a warp. Neither M nor the grid nor UNITS
// changes it, so a row's bits do not depend on the rows beside it.
//
// N >= 8, and for GATED N a multiple of 16; K a multiple of 64.
// -D: GROUPS (row groups of 8: 1, 2, 4, 6, 8), UNITS (summed at a time), STAGES (>= 2),
//     NORM (1: RMS norm of x first; GROUPS <= 2), EPILOGUE, MIN_BLOCKS (a multiprocessor).
#include "linear.cuh"

#define WARPS SLICES
#define ROWS (GROUPS * 8)
#define TILES ((GROUPS + 1) / 2)
#define ITEM 1024
#define X_IN_RING (GROUPS >= 4 && ARCH >= 80)     // else x goes straight to registers
#define STAGE ((UNITS + (X_IN_RING ? GROUPS : 0)) * ITEM)
// Filling a stage anew waits for its own reads where many rows leave room for few stages; with
// few rows the stage before it is filled instead, and no read stands in the way (measured).
#define REFILL_AT_ONCE (GROUPS >= 4)
#define AHEAD (REFILL_AT_ONCE ? STAGES : STAGES - 1)
#define PARTS (GROUPS >= 4 ? WARPS / 2 : WARPS)   // slices' sums held in shared memory at once
#define TURNS ((ROWS * UNITS * 8 / PAIR + WARPS * 32 - 1) / (WARPS * 32))   // outputs of a thread

// Place of 16-byte piece `piece` of row `row` in an item of 8 rows x 128 bytes, scrambled so
// that the lanes which are served together touch all banks.
DEVICE int scrambled(int row, int piece) {
#if CONSECUTIVE
  return (row * 8 + (piece ^ ((row & 3) * 2))) * 16;
#else
  return (row * 8 + (piece ^ ((row & 1) * 4))) * 16;
#endif
}

// Lane t's operand for 32 k of row g of an item: (x, y) for the first step, (z, w) for the second.
// `half`: which 32 of the item's 64 k.
DEVICE uint4 fragments(const unsigned char* item, int g, int t, int half) {
#if CONSECUTIVE
  // Of step s, half t / 2 of piece 2 s + t % 2.
  const uint2 p = *(const uint2*)(item + scrambled(g, half * 4 + (t & 1)) + (t >> 1) * 8);
  const uint2 q = *(const uint2*)(item + scrambled(g, half * 4 + 2 + (t & 1)) + (t >> 1) * 8);
  return make_uint4(p.x, p.y, q.x, q.y);
#else
  return *(const uint4*)(item + scrambled(g, half * 4 + t));
#endif
}

// The same from the piece t of 32 k that the lane has loaded. Lanes 0 and 1 have the first step's
// k, lanes 2 and 3 the second's: each gives half of it to the lane across.
DEVICE uint4 exchanged(uint4 p, int t) {
#if CONSECUTIVE
  const bool second = t & 2;
  const u32 a = shuffle_xor(second ? p.x : p.z, 2), b = shuffle_xor(second ? p.y : p.w, 2);
  return second ? make_uint4(a, b, p.z, p.w) : make_uint4(p.x, p.y, a, b);
#else
  return p;
#endif
}

ENTRY void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    linear(const elem* __restrict__ x, const elem* __restrict__ w, const elem* __restrict__ norm,
           const elem* __restrict__ bias, const elem* residual, void* out, int M, int N, int K,
           float eps) {
  DYNAMIC_SHARED(memory);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  float* sums = (float*)memory;                                   // [PARTS][UNITS][ROWS][8]
  float* squares = sums + PARTS * UNITS * ROWS * 8;               // [WARPS][ROWS]
  unsigned char* ring = (unsigned char*)(squares + WARPS * ROWS) + warp * STAGES * STAGE;

  let_next_start();
  const int half = N / PAIR;                                      // output columns
  const int total = (half + 7) / 8;
  const int begin = (int)((long long)total * blockIdx.x / gridDim.x) * PAIR;
  const int end = (int)((long long)total * (blockIdx.x + 1) / gridDim.x) * PAIR;
  const int chunks = K / 64;
  const int chunk_begin = slice_begin(warp, chunks), chunk_end = slice_begin(warp + 1, chunks);

  // Row of w at which a unit's eight features begin; the last unit may overlap the one before.
  auto unit_row = [&](int unit) {
    return PAIR == 2 ? (unit >> 1) * 8 + (unit & 1) * half : min(unit * 8, N - 8);
  };

#if ARCH >= 80
  const int lane_row = lane >> 3, lane_piece = lane & 7;
  const int lane_place = scrambled(lane_row, lane_piece);
  const elem* lane_w = w + (size_t)lane_row * K + lane_piece * 8;
  const size_t down4 = (size_t)4 * K;
  int in_first = begin, in_chunk = chunk_begin;
  if (chunk_begin == chunk_end) in_first = end;
  auto fetch_w = [&](int slot) {
    if (in_first < end) {
      const elem* from = lane_w + in_chunk * 64;
      unsigned char* to = ring + slot * STAGE + lane_place;
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        if (in_first + u < end) {
          const elem* p = from + (size_t)unit_row(in_first + u) * K;
          copy16(to + u * ITEM, p, true);
          copy16(to + u * ITEM + 512, p + down4, true);
        }
      if (++in_chunk == chunk_end) {
        in_chunk = chunk_begin;
        in_first += UNITS;
      }
    }
  };
#if X_IN_RING
  int x_first = begin, x_chunk = chunk_begin;
  auto fetch_x = [&](int slot) {
    if (x_first < end) {
      unsigned char* to = ring + slot * STAGE + UNITS * ITEM + lane_place;
      const elem* from = x + (size_t)lane_row * K + x_chunk * 64 + lane_piece * 8;
#pragma unroll
      for (int r = 0; r < GROUPS * 2; ++r) {
        const bool there = r * 4 + lane_row < M;
        copy16(to + r * 512, from + (there ? r * down4 : 0), there);
      }
      if (++x_chunk == chunk_end) {
        x_chunk = chunk_begin;
        x_first += UNITS;
      }
    }
  };
#endif
#pragma unroll 1
  for (int i = 0; i < AHEAD; ++i) {
    fetch_w(i);
    copy_commit();
  }
  int slot = 0, refill = REFILL_AT_ONCE ? 0 : STAGES - 1;
#endif

#if NORM
  auto load_norm = [&](uint4 (&v)[2], int c) {
    v[0] = *(const uint4*)(norm + c * 64 + t * 8);
    v[1] = *(const uint4*)(norm + c * 64 + 32 + t * 8);
  };
  uint4 next_norm[2];
  load_norm(next_norm, chunk_begin);
#endif

  wait_for_previous();

  // x as operand A: rows g of each group, for 64 k.
  auto load_x = [&](uint4 (&v)[GROUPS][2], int c) {
#pragma unroll
    for (int r = 0; r < GROUPS; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = r * 8 + g;
        v[r][h] = make_uint4(0, 0, 0, 0);
        if (row < M && c < chunk_end)
          v[r][h] = load_fresh((const uint4*)(x + (size_t)row * K + c * 64 + h * 32 + t * 8));
      }
  };
#if X_IN_RING
#pragma unroll 1
  for (int i = 0; i < AHEAD; ++i) fetch_x(i);
  copy_commit();
  copy_wait<0>();
#else
  uint4 next[GROUPS][2];
  load_x(next, chunk_begin);
#endif

  // The residual of this thread's first output, fetched early: its latency would stand alone.
  const int width0 = min(UNITS, end - begin) / PAIR * 8;
  elem early = 0;
  if (EPILOGUE == RESIDUAL && tid < M * width0 && begin * 8 + tid % width0 < N)
    early = load_fresh(residual + (size_t)(tid / width0) * N + begin * 8 + tid % width0);

#if NORM
  float scale[GROUPS];
  {
    float square[GROUPS];
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) square[r] = 0.f;
#pragma unroll 1
    for (int c0 = chunk_begin; c0 < chunk_end; c0 += 8 / GROUPS) {
      uint4 v[8 / GROUPS][GROUPS][2];   // all on their way before the first is looked at
#pragma unroll
      for (int i = 0; i < 8 / GROUPS; ++i) load_x(v[i], c0 + i);
#pragma unroll
      for (int i = 0; i < 8 / GROUPS; ++i)
#pragma unroll
        for (int r = 0; r < GROUPS; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const u32 p[4] = {v[i][r][h].x, v[i][r][h].y, v[i][r][h].z, v[i][r][h].w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              square[r] = fmaf(low_float(p[j]), low_float(p[j]), square[r]);
              square[r] = fmaf(high_float(p[j]), high_float(p[j]), square[r]);
            }
          }
    }
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      square[r] += shuffle_xor(square[r], 1);
      square[r] += shuffle_xor(square[r], 2);
      if (t == 0) squares[warp * ROWS + r * 8 + g] = square[r];
    }
    BARRIER_BLOCK();
#pragma unroll
    for (int r = 0; r < GROUPS; ++r) {
      float s = 0.f;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) s += squares[i * ROWS + r * 8 + g];
      scale[r] = rsqrtf(s / (float)K + eps);
    }
  }
#endif

#if NORM
  auto normalise = [&](uint4 (&v)[GROUPS][2], const uint4 (&weight)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 q = weight[h];
      const u32 n[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) {
        u32 p[4] = {v[r][h].x, v[r][h].y, v[r][h].z, v[r][h].w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          p[i] = pack(low_float(n[i]) * round_elem(low_float(p[i]) * scale[r]),
                      high_float(n[i]) * round_elem(high_float(p[i]) * scale[r]));
        v[r][h] = make_uint4(p[0], p[1], p[2], p[3]);
      }
    }
  };
#endif

#pragma unroll 1
  for (int first = begin; first < end; first += UNITS) {
    const int units = min(UNITS, end - first);
    float acc[UNITS][TILES][4];
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
      for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[u][m][i] = 0.f;

#if ARCH < 80
    uint4 ahead[UNITS][2];
    auto fetch = [&](int c) {
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        if (u < units) {
          const elem* from = w + (size_t)(unit_row(first + u) + g) * K + c * 64 + t * 8;
          ahead[u][0] = load_constant(from);
          ahead[u][1] = load_constant(from + 32);
        }
    };
    if (chunk_begin < chunk_end) fetch(chunk_begin);
#endif
#pragma unroll 1
    for (int c = chunk_begin; c < chunk_end; ++c) {
      uint4 a[GROUPS][2], b[UNITS][2];
#if !X_IN_RING
      // x is made ready while w is still on its way.
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) {
        a[r][0] = next[r][0];
        a[r][1] = next[r][1];
      }
      load_x(next, c + 1 < chunk_end ? c + 1 : chunk_begin);
#if NORM
      normalise(a, next_norm);
      load_norm(next_norm, c + 1 < chunk_end ? c + 1 : chunk_begin);
#endif
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) {
        a[r][0] = exchanged(a[r][0], t);
        a[r][1] = exchanged(a[r][1], t);
      }
#endif
#if ARCH >= 80
      copy_wait<AHEAD - 1>();
      BARRIER_WARP();
      const unsigned char* stage = ring + slot * STAGE;
#pragma unroll
      for (int u = 0; u < UNITS; ++u) {
        b[u][0] = fragments(stage + u * ITEM, g, t, 0);
        b[u][1] = fragments(stage + u * ITEM, g, t, 1);
      }
#else
#pragma unroll
      for (int u = 0; u < UNITS; ++u) {
        b[u][0] = ahead[u][0];
        b[u][1] = ahead[u][1];
      }
      if (c + 1 < chunk_end) fetch(c + 1);
#endif
#if X_IN_RING
#pragma unroll
      for (int r = 0; r < GROUPS; ++r) {
        a[r][0] = fragments(stage + (UNITS + r) * ITEM, g, t, 0);
        a[r][1] = fragments(stage + (UNITS + r) * ITEM, g, t, 1);
      }
#endif
#if ARCH >= 80
#if REFILL_AT_ONCE
      BARRIER_WARP();   // all lanes have read it
#endif
      fetch_w(refill);
#if X_IN_RING
      fetch_x(refill);
#endif
      copy_commit();
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      refill = refill + 1 == STAGES ? 0 : refill + 1;
#endif
      // Units that this pass does not have are summed from whatever lies there and dropped.
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int u = 0; u < UNITS; ++u)
#pragma unroll
          for (int m = 0; m < TILES; ++m) {
            const int h = step >> 1;
            const uint4 p = a[2 * m][h], q = b[u][h];
            const u32 b0 = step & 1 ? q.z : q.x, b1 = step & 1 ? q.w : q.y;
            const u32 a0 = step & 1 ? p.z : p.x, a2 = step & 1 ? p.w : p.y;
            float(&d)[4] = acc[u][m];
#if GROUPS == 1
            float z0 = 0.f, z1 = 0.f;   // rows 8..15 are not there: zeros in, nothing out
            mma(d[0], d[1], z0, z1, a0, 0, a2, 0, b0, b1);
#else
            const uint4 o = a[2 * m + 1][h];
            mma(d[0], d[1], d[2], d[3], a0, step & 1 ? o.z : o.x, a2, step & 1 ? o.w : o.y, b0, b1);
#endif
          }
    }

    // The slices' sums pass through shared memory, PARTS of them at a time; a thread's outputs
    // are e = tid, tid + 256, …
    auto part = [&](int slice, int u, int row) {
      return sums + ((slice % PARTS * UNITS + u) * ROWS + row) * 8;
    };
    auto keep = [&] {
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        if (u < units)
#pragma unroll
          for (int r = 0; r < GROUPS; ++r)
            *(float2*)(part(warp, u, r * 8 + g) + t * 2) =
                make_float2(acc[u][r / 2][(r & 1) * 2], acc[u][r / 2][(r & 1) * 2 + 1]);
    };
    const int width = units / PAIR * 8;
    float sum[TURNS][PAIR];
#pragma unroll
    for (int from = 0; from < WARPS; from += PARTS) {
      if (from > 0) BARRIER_BLOCK();   // those before have been read
      if (warp / PARTS == from / PARTS) keep();
      BARRIER_BLOCK();
#pragma unroll
      for (int n = 0; n < TURNS; ++n) {
        const int e = tid + n * WARPS * 32, row = e / width, f = e % width;
        if (e < M * width)
#pragma unroll
          for (int p = 0; p < PAIR; ++p) {
            float s = from == 0 ? 0.f : sum[n][p];
#pragma unroll
            for (int i = 0; i < PARTS; ++i) s += part(i, (f >> 3) * PAIR + p, row)[f & 7];
            sum[n][p] = s;
          }
      }
    }
#pragma unroll
    for (int n = 0; n < TURNS; ++n) {
      const int e = tid + n * WARPS * 32, row = e / width, f = e % width;
      if (e >= M * width) break;
      const int column = PAIR == 2 ? first / 2 * 8 + f : unit_row(first + (f >> 3)) + (f & 7);
      if (PAIR == 1 && column < (first + (f >> 3)) * 8) continue;   // the unit before has it
      const size_t at = (size_t)row * half + column;
#if EPILOGUE == GATED
      float gate = sum[n][0], up = sum[n][1];
      if (bias) {
        gate += to_float(bias[column]);
        up += to_float(bias[column + half]);
      }
      ((elem*)out)[at] = from_float(gated(gate, up));
#else
      float y = sum[n][0];
      if (bias) y += to_float(bias[column]);
#if EPILOGUE == STORE_FLOAT
      ((float*)out)[at] = y;
#elif EPILOGUE == RESIDUAL
      const elem r = first == begin && e == tid && begin * 8 + f == column ? early : load_fresh(residual + at);
      ((elem*)out)[at] = from_float(with_residual(r, y));
#else
      ((elem*)out)[at] = from_float(y);
#endif
#endif
    }
    if (first + UNITS < end) BARRIER_BLOCK();
  }
#if ARCH >= 80
  copy_wait<0>();
#endif
}
