// Attention of a ragged batch for spans of many rows, in two launches: `append`, `attend`.
//
// `append` rotates the new rows' queries in place and stores their keys and values in the arena.
// `attend`: one work item = (sequence, TILE packed queries of a KV head, query = row * group +
// head in the group). A warp keeps 16 * ROW_TILES of them, and takes the cuts that the tile sees in
// ascending order while the next one is on its way to shared memory. The cut's values are summed
// up CHUNK columns at a time, so that the registers hold one result and not two.
//
// A row's bits are those of attention.cu: see attention.cuh. On Hopper attention_wgmma.cu takes the
// place of `attend` for most heads.
//
// -D: see attention.cuh; ROW_TILES (1, 2), STAGES (cuts in shared memory: 1, 2), BLOCKS (of
// `attend`, a multiprocessor).
#include "attention_many.cuh"

#define ROWS (16 * ROW_TILES)           // queries of a warp
#define TILE (ROWS * WARPS)
#define CHUNK 4                         // 8-column tiles of values
#define HEADS_AT_ONCE 4

ENTRY void __launch_bounds__(THREADS)
    append(elem* qkv, elem* keys, elem* values, const int* starts, const int* prefix_starts,
           const int* prefix_lens, const int* first_rows, const int* row_counts,
           const int* positions, int position_offset, const float2* __restrict__ rope,
           const elem* __restrict__ q_norm, const elem* __restrict__ k_norm, float eps, int batch,
           int heads, int kv_heads, int ring) {
  DYNAMIC_SHARED(memory);
  Sequence* about = (Sequence*)memory;    // [MAX_BATCH], units: rows
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int stride = (heads + 2 * kv_heads) * HEAD_DIM;
  let_next_start();
  wait_for_previous();
  const Sequences from = {starts, prefix_starts, prefix_lens, first_rows, row_counts, positions, position_offset};
  for (int s = tid; s < batch; s += THREADS) about[s] = load_sequence(from, s);
  BARRIER_BLOCK();

  int before = 0, s = 0;     // rows of the sequences before s
  for (int item = blockIdx.x;; item += gridDim.x) {
    while (s < batch && item >= before + about[s].rows) before += about[s++].rows;
    if (s >= batch) break;
    const Sequence own = about[s];
    const int p = own.position + item - before;
    elem* row = qkv + (size_t)(own.first + item - before) * stride;
    Turn turn;
    load_turn(turn, rope, p, lane);
    // A warp takes every WARPS-th head. All loads are asked for before the first is used.
    for (int h0 = warp; h0 < heads + kv_heads; h0 += WARPS * HEADS_AT_ONCE) {
      HeadRow raw[HEADS_AT_ONCE], value[HEADS_AT_ONCE];
#pragma unroll
      for (int j = 0; j < HEADS_AT_ONCE; ++j) {
        const int h = h0 + j * WARPS;
        if (h < heads + kv_heads) load_row(raw[j], row + h * HEAD_DIM, lane);
        if (h >= heads && h < heads + kv_heads) load_row(value[j], row + (h + kv_heads) * HEAD_DIM, lane);
      }
#pragma unroll
      for (int j = 0; j < HEADS_AT_ONCE; ++j) {
        const int h = h0 + j * WARPS;
        if (h >= heads + kv_heads) continue;
        const HeadRow made = embedded(raw[j], turn, h < heads ? q_norm : k_norm, eps, lane);
        if (h < heads) {
          store_row(made, row + h * HEAD_DIM, lane);
        } else {
          const size_t at = ((size_t)slot_of(own, ring, p) * kv_heads + h - heads) * HEAD_DIM;
          store_row(made, keys + at, lane);
          store_row(value[j], values + at, lane);
        }
      }
    }
  }
}

ENTRY void __launch_bounds__(THREADS, BLOCKS)
    attend(const elem* qkv, const elem* keys, const elem* values, elem* __restrict__ out,
           const int* starts, const int* prefix_starts, const int* prefix_lens,
           const int* first_rows, const int* row_counts, const int* positions,
           int position_offset, int batch, int heads, int kv_heads, int window, int ring,
           float scale) {
  DYNAMIC_SHARED(memory);
  elem* q_tile = (elem*)memory;
  elem* k_tiles = q_tile + TILE * HEAD_DIM;                               // [STAGES]
  elem* v_tiles = k_tiles + STAGES * TOKENS * HEAD_DIM;                   // [STAGES]
  Sequence* about = (Sequence*)(v_tiles + STAGES * TOKENS * HEAD_DIM);    // [MAX_BATCH], units: tiles
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int mi = lane >> 3, l8 = lane & 7;
  const int group = heads / kv_heads, stride = (heads + 2 * kv_heads) * HEAD_DIM;
  let_next_start();
  wait_for_previous();
  const Sequences from = {starts, prefix_starts, prefix_lens, first_rows, row_counts, positions, position_offset};
  order_sequences(about, from, batch, group, TILE);

  Items items = {about, batch, group, kv_heads, TILE, 0, 0, 0};
  Item item;
  while (next_item(items, item)) {
    const Sequence& own = *item.own;
    const int head = item.head, q0 = item.q0, queries = item.queries;
    const int warp_first = position_of(item, q0 + warp * ROWS);
    const int warp_last = position_of(item, q0 + warp * ROWS + ROWS - 1);
    const Cuts cuts = cuts_of(item, q0, TILE, window);

    auto fill = [&](int cut) {
      const Sequence where = own;
      const int stage = (cut - cuts.first) % STAGES * TOKENS * HEAD_DIM, begin = cut * TOKENS;
      const int left = where.position + where.rows - begin;    // tokens that are written
      auto copy = [&](int token, size_t slot, bool written) {
        const size_t at = (slot * kv_heads + head) * HEAD_DIM + tid % PIECES * 8;
        copy16(place(k_tiles + stage, token, tid % PIECES, PIECES), keys + at, written);
        copy16(place(v_tiles + stage, token, tid % PIECES, PIECES), values + at, written);
      };
      const int slot = slot_of_whole(where, ring, begin);
      if (slot >= 0) {
#pragma unroll
        for (int i = 0; i < TOKENS * PIECES / THREADS; ++i) {
          const int token = tid / PIECES + i * (THREADS / PIECES);
          copy(token, slot + token, true);
        }
      } else {
#pragma unroll 1
        for (int token = tid / PIECES; token < TOKENS; token += THREADS / PIECES)
          copy(token, slot_of(where, ring, begin + min(token, left - 1)), token < left);
      }
      copy_commit();
    };
    for (int e = tid; e < TILE * PIECES; e += THREADS) {
      const int q = q0 + e / PIECES;
      copy16(place(q_tile, e / PIECES, e % PIECES, PIECES),
             qkv + (q < queries ? row_of(item, q, stride) + e % PIECES * 8 : 0), q < queries);
    }
    if (STAGES > 1) fill(cuts.first);

    Sums sums[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) clear(sums[m]);
    const int query = place_of(warp * ROWS + (mi & 1) * 8 + l8, mi >> 1, PIECES);

    Sums past[ROW_TILES];
    keep_in_memory(past);
    bool has_past = false;

    for (int cut = cuts.first; cut <= cuts.last; ++cut) {
      if (cut % SPAN == 0 && cut > cuts.first) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) begin_span(sums[m], past[m], has_past);
        has_past = true;
      }
      if (STAGES == 1) {
        if (cut > cuts.first) BARRIER_BLOCK();    // all have read the cut before
        fill(cut);
      }
      copy_wait<0>();
      BARRIER_BLOCK();
      if (STAGES > 1 && cut < cuts.last) fill(cut + 1);
      const int begin = cut * TOKENS;
      const bool idle = q0 + warp * ROWS >= queries;
      if (idle || begin > warp_last || first_seen(warp_first, window) >= begin + TOKENS) continue;
      const int stage = (cut - cuts.first) % STAGES * TOKENS * HEAD_DIM;
      const int key = stage + place_of((mi >> 1) * 8 + l8, mi & 1, PIECES);
      const int value = stage + place_of((mi & 1) * 8 + l8, mi >> 1, PIECES);

      float c[ROW_TILES][NTILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < NTILES; ++n) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0.f;
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; ++k) {
        u32 a[ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
          ldmatrix(a[m][0], a[m][1], a[m][2], a[m][3], q_tile + m * 16 * HEAD_DIM + along(query, 2 * k));
#pragma unroll
        for (int n = 0; n < NTILES; n += 2) {
          u32 b0, b1, b2, b3;
          ldmatrix(b0, b1, b2, b3, k_tiles + n * 8 * HEAD_DIM + along(key, 2 * k));
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m) {
            float(&x)[4] = c[m][n], (&z)[4] = c[m][n + 1];
            mma(x[0], x[1], x[2], x[3], a[m][0], a[m][1], a[m][2], a[m][3], b0, b1);
            mma(z[0], z[1], z[2], z[3], a[m][0], a[m][1], a[m][2], a[m][3], b2, b3);
          }
        }
      }
      if (begin + TOKENS - 1 > warp_first || first_seen(warp_last, window) > begin) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            hide(c[m], h, position_of(item, q0 + warp * ROWS + m * 16 + h * 8 + g), begin, t, window);
      }

      u32 weights[ROW_TILES][NTILES][2];
      Fold folds[ROW_TILES][2];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) weigh(c[m], scale, weights[m], sums[m], folds[m]);

#pragma unroll
      for (int d = 0; d < PIECES; d += CHUNK) {
        float o[ROW_TILES][CHUNK][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int n = 0; n < CHUNK; ++n) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0.f;
#pragma unroll
        for (int k = 0; k < TOKENS / 16; ++k)
#pragma unroll
          for (int n = 0; n < CHUNK; n += 2) {
            u32 b0, b1, b2, b3;
            ldmatrix_transposed(b0, b1, b2, b3, v_tiles + k * 16 * HEAD_DIM + along(value, d + n));
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
              const u32(&low)[2] = weights[m][2 * k], (&high)[2] = weights[m][2 * k + 1];
              float(&x)[4] = o[m][n], (&z)[4] = o[m][n + 1];
              mma(x[0], x[1], x[2], x[3], low[0], low[1], high[0], high[1], b0, b1);
              mma(z[0], z[1], z[2], z[3], low[0], low[1], high[0], high[1], b2, b3);
            }
          }
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) fold_values(sums[m], d, o[m], folds[m]);
      }
    }

    if (has_past)
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) join_past(sums[m], past[m]);

    // Through the place of the warp's own queries, so that whole rows are written.
    BARRIER_WARP();
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float share = 1.f / sums[m].total[h];
#pragma unroll
        for (int n = 0; n < PIECES; ++n)
          *(u32*)(place(q_tile, warp * ROWS + m * 16 + h * 8 + g, n, PIECES) + 2 * t) =
              pack(sums[m].y[n][h * 2] * share, sums[m].y[n][h * 2 + 1] * share);
      }
    BARRIER_WARP();
    for (int e = lane; e < ROWS * PIECES; e += 32) {
      const int row = warp * ROWS + e / PIECES, q = q0 + row;
      if (q < queries)
        *(uint4*)(out + row_of(item, q, heads * HEAD_DIM) + e % PIECES * 8) =
            *(const uint4*)place(q_tile, row, e % PIECES, PIECES);
    }
    BARRIER_BLOCK();    // all have read the last cut
  }
}
