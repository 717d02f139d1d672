// out[M, N] = epilogue(x[M, K] · w[N, K]ᵀ) for many rows; the sums in the order of linear.cuh.
//
// Bound by the tensor cores. Blocks take tiles of BLOCK_M rows by BLOCK_N rows of w, one after
// the other; for GATED half of those are gates and half the ups of the same outputs, in turns of
// eight. A stage of the ring holds 64 k of both and is filled STAGES - 1 chunks ahead, also
// across tiles. A warp has 32 columns of a tile and keeps two accumulators: of the slice, and of
// the slices before it.
//
// N >= 8, and for GATED a multiple of 16; K a multiple of 64. Where N is a multiple of 8 the
// residual and out are aligned to 16 bytes.
// -D: BLOCK_M, BLOCK_N, STAGES (>= 2; 2 where ARCH < 80), EPILOGUE, MIN_BLOCKS (a multiprocessor).
#include "linear.cuh"

#define WARPS 8
#define THREADS (WARPS * 32)
#define COLUMNS (BLOCK_N / PAIR)               // outputs of a tile's row
#define WARPS_N (BLOCK_N / 32)
#define WARP_ROWS (BLOCK_M * WARPS_N / WARPS)
#define MS (WARP_ROWS / 16)                    // products of 16 x 8 of a warp: MS x NS
#define NS 4
#define STAGE ((BLOCK_M + BLOCK_N) * 128)
#define SWEEP (THREADS / 8)                    // rows that all threads fetch together
#define XS (BLOCK_M / SWEEP)
#define WS (BLOCK_N / SWEEP)
#define TALL 8                                 // tiles on top of each other that share columns of w

// Place of 16-byte piece `piece` of a row of 128 bytes, scrambled so that the lanes which are
// served together touch all banks: eight rows of one piece each, or two rows of four.
DEVICE int scrambled(int row, int piece) {
  return (row * 8 + (piece ^ (CONSECUTIVE ? row & 7 : (row & 1) * 4))) * 16;
}

ENTRY void __launch_bounds__(THREADS, MIN_BLOCKS)
    linear_many(const elem* __restrict__ x, const elem* __restrict__ w,
                const elem* __restrict__ bias, const elem* residual, void* out, int M, int N, int K) {
  DYNAMIC_SHARED(ring);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int half = N / PAIR, chunks = K / 64;
  const int m_tiles = (M + BLOCK_M - 1) / BLOCK_M, n_tiles = (half + COLUMNS - 1) / COLUMNS;
  const int tiles = m_tiles * n_tiles;

  let_next_start();

  // A tile's first row and first output. Tiles that run at the same time are TALL high, so that
  // the second level cache gives each of them what others have read.
  int row0, column0;
  auto find = [&](int tile) {
    const int above = tile / (TALL * n_tiles) * TALL, in = tile - above * n_tiles;
    const int height = min(TALL, m_tiles - above);
    row0 = (above + in % height) * BLOCK_M;
    column0 = in / height * COLUMNS;
  };

  // Fetching runs ahead of the sums by its own count of tiles and chunks.
  const int fetch_row = tid >> 3, fetch_place = scrambled(fetch_row, tid & 7);
  const int fetch_column = PAIR == 2 ? (fetch_row >> 4) * 8 + (fetch_row & 7) : fetch_row;
  const int x_down = SWEEP * K, w_down = SWEEP / PAIR * K;
  int in_tile, in_chunk, x_left, w_left;
  const elem *x_from, *w_from;
  auto enter = [&](int tile) {
    in_tile = tile;
    in_chunk = 0;
    x_left = w_left = 0;
    if (tile >= tiles) return;   // zeros, which nobody reads
    find(tile);
    x_left = M - row0 - fetch_row;
    w_left = half - column0 - fetch_column;
    x_from = x + (size_t)(row0 + fetch_row) * K + (tid & 7) * 8;
    w_from = w + (size_t)(column0 + fetch_column) * K + (tid & 7) * 8;
    if (PAIR == 2 && (fetch_row & 8)) w_from += (size_t)half * K;
  };
  auto advance = [&] {
    x_from += 64;
    w_from += 64;
    if (++in_chunk == chunks) enter(in_tile + gridDim.x);
  };
#if ARCH >= 80
  auto fetch_x = [&](int slot) {
    unsigned char* to = ring + slot * STAGE + fetch_place;
#pragma unroll
    for (int i = 0; i < XS; ++i) {
      const bool there = i * SWEEP < x_left;
      copy16(to + i * SWEEP * 128, there ? x_from + i * x_down : x, there);
    }
  };
  auto fetch_w = [&](int slot) {
    unsigned char* to = ring + slot * STAGE + BLOCK_M * 128 + fetch_place;
#pragma unroll
    for (int i = 0; i < WS; ++i) {
      const bool there = i * (SWEEP / PAIR) < w_left;
      copy16(to + i * SWEEP * 128, there ? w_from + i * w_down : w, there);
    }
  };
  enter(blockIdx.x);
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; ++i) {
    fetch_w(i);
    advance();
  }
  wait_for_previous();
  enter(blockIdx.x);
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; ++i) {
    fetch_x(i);
    advance();
    copy_commit();
  }
#else
  // Held in registers while the chunk before is summed: there is nothing that copies alone.
  uint4 held[XS + WS];
  auto fetch = [&] {
#pragma unroll
    for (int i = 0; i < XS + WS; ++i) held[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < XS; ++i)
      if (i * SWEEP < x_left) held[i] = load_fresh((const uint4*)(x_from + i * x_down));
#pragma unroll
    for (int i = 0; i < WS; ++i)
      if (i * (SWEEP / PAIR) < w_left) held[XS + i] = load_constant(w_from + i * w_down);
    advance();
  };
  auto put = [&](int slot) {
#pragma unroll
    for (int i = 0; i < XS + WS; ++i)   // the rows of w lie behind those of x
      *(uint4*)(ring + slot * STAGE + fetch_place + i * SWEEP * 128) = held[i];
  };
  enter(blockIdx.x);
  wait_for_previous();
  fetch();
  put(0);
#endif

  const int warp_row = warp / WARPS_N * WARP_ROWS, warp_column = warp % WARPS_N * 32;
#if CONSECUTIVE
  const int x_place = scrambled(warp_row + (lane & 15), lane >> 4);
  const int w_place = scrambled(BLOCK_M + warp_column + (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
#else
  const int x_place = scrambled(warp_row + g, t), w_place = scrambled(BLOCK_M + warp_column + g, t);
#endif
  int slot = 0, refill = STAGES - 1;

#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float total[MS][NS][4], sum[MS][NS][4];
#pragma unroll
    for (int m = 0; m < MS; ++m)
#pragma unroll
      for (int n = 0; n < NS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[m][n][i] = 0.f;

#pragma unroll 1
    for (int slice = 0; slice < SLICES; ++slice) {
#pragma unroll
      for (int m = 0; m < MS; ++m)
#pragma unroll
        for (int n = 0; n < NS; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.f;

#pragma unroll 1
      for (int c = slice_begin(slice, chunks); c < slice_begin(slice + 1, chunks); ++c) {
#if ARCH >= 80
        copy_wait<STAGES - 2>();
        BARRIER_BLOCK();   // this chunk is there, and the one before it is read
        fetch_x(refill);
        fetch_w(refill);
        advance();
        copy_commit();
#else
        BARRIER_BLOCK();
        fetch();
#endif
        const unsigned char* stage = ring + slot * STAGE;
#if CONSECUTIVE
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          u32 a[MS][4], b[NS][2];
#pragma unroll
          for (int m = 0; m < MS; ++m)
            ldmatrix(a[m][0], a[m][1], a[m][2], a[m][3], stage + m * 2048 + (x_place ^ (step * 32)));
#pragma unroll
          for (int n = 0; n < NS; n += 2)
            ldmatrix(b[n][0], b[n][1], b[n + 1][0], b[n + 1][1], stage + n * 1024 + (w_place ^ (step * 32)));
#pragma unroll
          for (int m = 0; m < MS; ++m)
#pragma unroll
            for (int n = 0; n < NS; ++n) {
              float(&d)[4] = sum[m][n];
              mma(d[0], d[1], d[2], d[3], a[m][0], a[m][1], a[m][2], a[m][3], b[n][0], b[n][1]);
            }
        }
#else
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint4 b[NS];
#pragma unroll
          for (int n = 0; n < NS; ++n) b[n] = *(const uint4*)(stage + n * 1024 + (w_place ^ (h * 64)));
#pragma unroll
          for (int m = 0; m < MS; ++m) {
            const uint4 p = *(const uint4*)(stage + m * 2048 + (x_place ^ (h * 64)));
            const uint4 o = *(const uint4*)(stage + m * 2048 + 1024 + (x_place ^ (h * 64)));
#pragma unroll
            for (int n = 0; n < NS; ++n) {
              float(&d)[4] = sum[m][n];
              mma(d[0], d[1], d[2], d[3], p.x, o.x, p.y, o.y, b[n].x, b[n].y);
            }
#pragma unroll
            for (int n = 0; n < NS; ++n) {
              float(&d)[4] = sum[m][n];
              mma(d[0], d[1], d[2], d[3], p.z, o.z, p.w, o.w, b[n].z, b[n].w);
            }
          }
        }
#endif
#if ARCH < 80
        put(refill);
#endif
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        refill = refill + 1 == STAGES ? 0 : refill + 1;
      }
#pragma unroll
      for (int m = 0; m < MS; ++m)
#pragma unroll
        for (int n = 0; n < NS; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) total[m][n][i] += sum[m][n][i];
    }

    find(tile);
    const int row = row0 + warp_row + g;            // and 8 more, and 16 m more
    const int column = column0 + warp_column / PAIR;  // the warp's first
    auto bias_of = [&](int n, int i) {              // of the sums [m][n][i]
      const int at = column + n / PAIR * 8 + t * 2 + (i & 1);
      return to_float(bias[at + (n % PAIR) * half]);
    };
    auto there = [&](int n, int i) { return column + n / PAIR * 8 + t * 2 + (i & 1) < half; };
    if (bias) {
#pragma unroll
      for (int n = 0; n < NS; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float value = there(n, i) ? bias_of(n, i) : 0.f;
#pragma unroll
          for (int m = 0; m < MS; ++m) {
            total[m][n][i] += value;
            total[m][n][i + 2] += value;
          }
        }
    }
#if EPILOGUE == STORE_FLOAT
#pragma unroll
    for (int m = 0; m < MS; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < NS; ++n) {
          if (row + m * 16 + h * 8 >= M) continue;
          float* to = (float*)out + (size_t)(row + m * 16 + h * 8) * half + column + n * 8 + t * 2;
          const float first = total[m][n][h * 2], second = total[m][n][h * 2 + 1];
          if (half % 2 == 0 && there(n, 0)) {
            *(float2*)to = make_float2(first, second);
          } else {
            if (there(n, 0)) to[0] = first;
            if (there(n, 1)) to[1] = second;
          }
        }
#else
    // Four lanes have a word each of four pieces of 8 outputs; a lane is to have one piece whole.
    // The four stand together, or (GATED) two by two in two rows.
    const int own = column + (PAIR == 2 ? t & 1 : t) * 8;
    auto own_row = [&](int m, int h) { return row + m * 16 + (PAIR == 2 ? t >> 1 : h) * 8; };
    auto words = [&](u32 (&v)[4], int m, int h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#if EPILOGUE == GATED
        const float(&gate)[4] = total[m][i % 2 * 2], (&up)[4] = total[m][i % 2 * 2 + 1];
        const int at = i / 2 * 2;
        v[i] = pack(gated(gate[at], up[at]), gated(gate[at + 1], up[at + 1]));
#else
        v[i] = pack(total[m][i][h * 2], total[m][i][h * 2 + 1]);
#endif
      }
    };
    uint4 before[MS][2];   // all on their way before the first is looked at
#pragma unroll
    for (int m = 0; m < MS; ++m)
#pragma unroll
      for (int h = 0; h < 2 / PAIR; ++h)
        if (own_row(m, h) < M && own < half)
          before[m][h] = load_residual(residual, (size_t)own_row(m, h) * half + own, half);
#pragma unroll
    for (int m = 0; m < MS; ++m)
#pragma unroll
      for (int h = 0; h < 2 / PAIR; ++h) {
        u32 v[4];
        words(v, m, h);
        transpose(v, t);
        if (own_row(m, h) < M && own < half)
          store((elem*)out, (size_t)own_row(m, h) * half + own, v, own, half, residual, before[m][h]);
      }
#endif
  }
#if ARCH >= 80
  copy_wait<0>();
#endif
}
