// Attention of a ragged batch over the KV arena, with rotary embedding and the append of
// the new rows' keys and values folded in.
//
// Each sequence brings `rows` query rows at positions position .. position + rows - 1; their
// q, k, v come raw from the projection. KV is cut at fixed multiples of TOKENS positions. One
// work item = (sequence, TOKENS positions, KV head): it embeds and stores the new keys and
// values that fall into its cut, attends all query rows of its head group to the cut, and the
// last item of a span of cuts to finish folds them together; so does the last span with the spans.
// A cut that a row may not see adds exactly nothing (weight 0), so a row's bits depend
// neither on the rows beside it nor on the batch.
// `position_offset` is added to every position: the steps of a draft loop share one buffer.
//
// The order in which everything is summed up, and so the bits, is told in attention.cuh.
// -D: see attention.cuh.
#include "attention.cuh"

#define NTILES (TOKENS / SLICES / 8)    // 8-token score tiles of a warp, whose tokens are a slice
#define OUT_PIECES (PIECES / WARPS)     // output columns of a warp, in eights
#define QUERIES_PER_WARP (16 / WARPS)
#define NEW_AT_ONCE 2

// Where the partial results of one (sequence, KV head) lie and go. Of its cuts, those at `from`,
// `from` + `stride`, ... (0 where that is below) are folded: the cuts of a span, whose result then
// replaces that of its first cut; or (`spans`) these results. `last`: what comes out is the end.
struct Cuts {
  float* partial;
  float4* stats;      // peak and sum of a cut's weights; then of its span's
  elem* out;
  int first_item;
  size_t step;
  int row_capacity, from, stride, count, queries, first_row, group, head, heads;
  bool spans, last;
};

#define COLUMNS (HEAD_DIM / 4)          // threads that share a query, four columns each
#define BATCH 4                         // cuts that are folded at a time
#define QUERIES_A_WARP (COLUMNS < 32 ? 32 / COLUMNS : 1)

// Folds cuts, or spans, in ascending order. While WORKERS threads fold, as many cuts as the room of keys
// and values holds are on their way to each one's own part of it, also from one query to its next;
// what their weights are relative to, and add up to, goes to `stat_room`, once a warp and query.
template <int WORKERS> DEVICE void combine(const Cuts& c, uint4* room, float4* stat_room, int tid) {
  constexpr int BATCHES = TOKENS * HEAD_DIM * 4 / (WORKERS * 16) / BATCH;
  if (tid >= WORKERS) return;
  const int all = c.queries * COLUMNS, lane = tid % 32, column = tid % COLUMNS * 4;
  const bool leads = lane % COLUMNS == 0;
  stat_room += tid / 32 * BATCHES * BATCH * QUERIES_A_WARP + lane / COLUMNS;
  room += tid;
  int asked = 0, asked_cut = 0, asked_slot = 0;     // asked, done: of `all`, by all workers
  auto place_at = [&](int i) { return max(0, c.from + i * c.stride); };
  auto ask = [&] {
    if (asked < all) {
      const int q = min(asked + tid, all - 1) / COLUMNS;
      const size_t at0 = (size_t)c.first_item * c.row_capacity + q;
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const size_t at = at0 + place_at(min(asked_cut + i, c.count - 1)) * c.step;
        copy16(room + (asked_slot + i) * WORKERS, c.partial + at * HEAD_DIM + column, true);
        if (leads) copy16(stat_room + (asked_slot + i) * QUERIES_A_WARP, c.stats + at, true);
      }
      asked_cut += BATCH;
      if (asked_cut >= c.count) asked_cut = 0, asked += WORKERS;
      asked_slot = (asked_slot + BATCH) % (BATCHES * BATCH);
    }
    copy_commit();
  };
  for (int batch = 0; batch < BATCHES; ++batch) ask();

  float top = NEGATIVE_INFINITY, total = 0.f, y[4] = {0.f, 0.f, 0.f, 0.f};
  for (int done = 0, cut = 0, slot = 0; done < all; slot = (slot + BATCH) % (BATCHES * BATCH)) {
    float4 stats[BATCH];
    uint4 v[BATCH];
    copy_wait<BATCHES - 1>();
    BARRIER_WARP();
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      stats[i] = stat_room[(slot + i) * QUERIES_A_WARP];
      v[i] = room[(slot + i) * WORKERS];
    }
    BARRIER_WARP();
    ask();
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      if (cut + i < c.count) {
        const Fold f = fold(top, c.spans ? stats[i].z : stats[i].x);
        total = folded(total, c.spans ? stats[i].w : stats[i].y, f);
        y[0] = folded(y[0], __uint_as_float(v[i].x), f);
        y[1] = folded(y[1], __uint_as_float(v[i].y), f);
        y[2] = folded(y[2], __uint_as_float(v[i].z), f);
        y[3] = folded(y[3], __uint_as_float(v[i].w), f);
      }
    cut += BATCH;
    if (cut < c.count) continue;
    const int q = (done + tid) / COLUMNS;
    if (done + tid < all && !c.last) {
      const size_t at = (size_t)c.first_item * c.row_capacity + q + place_at(0) * c.step;
      *(float4*)(c.partial + at * HEAD_DIM + column) = make_float4(y[0], y[1], y[2], y[3]);
      if (leads) c.stats[at].z = top, c.stats[at].w = total;
    }
    if (done + tid < all && c.last) {
      const size_t row = (size_t)(c.first_row + q / c.group) * c.heads + c.head * c.group + q % c.group;
      const float share = 1.f / total;
      *(uint2*)(c.out + row * HEAD_DIM + column) =
          make_uint2(pack(y[0] * share, y[1] * share), pack(y[2] * share, y[3] * share));
    }
    done += WORKERS;
    cut = 0;
    top = NEGATIVE_INFINITY;
    total = y[0] = y[1] = y[2] = y[3] = 0.f;
  }
}

ENTRY void __launch_bounds__(THREADS, HEAD_DIM <= 128 && TOKENS <= 64 ? 4 : 1)
    attention(const elem* __restrict__ qkv, elem* keys, elem* values, elem* __restrict__ out,
              const int* starts, const int* prefix_starts, const int* prefix_lens,
              const int* first_rows, const int* row_counts, const int* positions,
              int position_offset, const float2* __restrict__ rope,
              const elem* __restrict__ q_norm, const elem* __restrict__ k_norm, float eps,
              float* partial, float4* partial_stats, int* counters, int batch, int heads,
              int kv_heads, int row_capacity, int window, int ring, float scale) {
  DYNAMIC_SHARED(memory);
  elem* k_tile = (elem*)memory;
  elem* v_tile = k_tile + TOKENS * HEAD_DIM;
  elem* q_tile = v_tile + TOKENS * HEAD_DIM;
  elem* p_tile = q_tile + 16 * HEAD_DIM;
  float* tile_max = (float*)(p_tile + 16 * TOKENS);     // [WARPS][16]
  float4* tile_sum = (float4*)(tile_max + WARPS * 16);  // [WARPS][16], a lane t each
  Sequence* about = (Sequence*)(tile_sum + WARPS * 16); // [MAX_BATCH], units: cuts
  int* flag = (int*)(about + MAX_BATCH);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int group = heads / kv_heads, stride = (heads + 2 * kv_heads) * HEAD_DIM;

  let_next_start();
  const Sequences from = {starts, prefix_starts, prefix_lens, first_rows, row_counts, positions, position_offset};
  for (int s = tid; s < batch; s += THREADS) {
    Sequence a = load_sequence(from, s);
    const int low = first_seen(a.position, window);
    a.units = a.rows > 0 ? (a.position + a.rows - 1) / TOKENS - low / TOKENS + 1 : 0;
    about[s] = a;
  }
  BARRIER_BLOCK();

  bool waited = false;
  int before = 0, s = 0;     // items of the sequences before s
  for (int item = blockIdx.x;; item += gridDim.x) {
    while (s < batch && item >= before + about[s].units * kv_heads) before += about[s++].units * kv_heads;
    if (s >= batch) break;
    const Sequence own = about[s];
    const int cuts = own.units, head = (item - before) % kv_heads, cut = (item - before) / kv_heads;
    const int rows = own.rows, position = own.position, first = own.first;
    const int begin = (first_seen(position, window) / TOKENS + cut) * TOKENS, end = position + rows;
    const int queries = rows * group;
    auto arena_at = [&](int p) { return ((size_t)slot_of(own, ring, p) * kv_heads + head) * HEAD_DIM; };
    auto query_at = [&](int q) {
      return qkv + (size_t)(first + q / group) * stride + (head * group + q % group) * HEAD_DIM;
    };

    // Tokens of earlier steps: nothing in flight writes them.
    for (int e = tid; e < TOKENS * PIECES; e += THREADS) {
      const int token = e / PIECES, piece = e % PIECES, p = begin + token;
      const bool old = p < position;
      if (old || p >= end) {
        const size_t at = old ? arena_at(p) + piece * 8 : 0;
        copy16(place(k_tile, token, piece, PIECES), keys + at, old);
        copy16(place(v_tile, token, piece, PIECES), values + at, old);
      }
    }
    copy_commit();
    const int new_begin = max(begin, position), new_end = min(begin + TOKENS, end);
    Turn q_turn[QUERIES_PER_WARP], k_turn[NEW_AT_ONCE];
    auto load_q_turns = [&](int m0) {
#pragma unroll
      for (int j = 0; j < QUERIES_PER_WARP; ++j)
        load_turn(q_turn[j], rope, position + min(m0 + warp + j * WARPS, queries - 1) / group, lane);
    };
    load_q_turns(0);
#pragma unroll
    for (int j = 0; j < NEW_AT_ONCE; ++j)
      load_turn(k_turn[j], rope, min(new_begin + warp + j * WARPS, end - 1), lane);
    if (!waited) wait_for_previous();
    waited = true;

    // All that the projection made is asked for before the first of it is used.
    HeadRow q_raw[QUERIES_PER_WARP];
    auto load_queries = [&](int m0) {
#pragma unroll
      for (int j = 0; j < QUERIES_PER_WARP; ++j)
        load_row(q_raw[j], query_at(min(m0 + warp + j * WARPS, queries - 1)), lane);
    };
    load_queries(0);

    // New tokens of this cut: embed, keep for this item, store in the arena.
    for (int p0 = new_begin + warp; p0 < new_end; p0 += WARPS * NEW_AT_ONCE) {
      HeadRow k_raw[NEW_AT_ONCE], v_raw[NEW_AT_ONCE];
#pragma unroll
      for (int j = 0; j < NEW_AT_ONCE; ++j) {
        const int p = min(p0 + j * WARPS, new_end - 1);
        const elem* row = qkv + (size_t)(first + p - position) * stride;
        load_row(k_raw[j], row + (heads + head) * HEAD_DIM, lane);
        load_row(v_raw[j], row + (heads + kv_heads + head) * HEAD_DIM, lane);
        if (p0 != new_begin + warp) load_turn(k_turn[j], rope, p, lane);
      }
#pragma unroll
      for (int j = 0; j < NEW_AT_ONCE; ++j) {
        const int p = p0 + j * WARPS, token = p - begin;
        if (p >= new_end) continue;
        const size_t at = arena_at(p);
        const HeadRow key = embedded(k_raw[j], k_turn[j], k_norm, eps, lane);
        place_row(key, k_tile, token, lane);
        store_row(key, keys + at, lane);
        place_row(v_raw[j], v_tile, token, lane);
        store_row(v_raw[j], values + at, lane);
      }
    }

    for (int m0 = 0; m0 < queries; m0 += 16) {
      if (m0 > 0) {
        load_q_turns(m0);
        load_queries(m0);
      }
      // Rows beyond the last query repeat it; their results are dropped.
#pragma unroll
      for (int j = 0; j < QUERIES_PER_WARP; ++j)
        place_row(embedded(q_raw[j], q_turn[j], q_norm, eps, lane), q_tile, warp + j * WARPS, lane);
      copy_wait<0>();
      BARRIER_BLOCK();

      // Scores: each warp TOKENS / WARPS tokens.
      const int mi = lane >> 3, l8 = lane & 7;
      float c[NTILES][4];
#pragma unroll
      for (int n = 0; n < NTILES; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; ++k) {
        u32 a0, a1, a2, a3;
        ldmatrix(a0, a1, a2, a3, place(q_tile, (mi & 1) * 8 + l8, 2 * k + (mi >> 1), PIECES));
#pragma unroll
        for (int n = 0; n < NTILES; n += 2) {
          u32 b0, b1, b2, b3;
          ldmatrix(b0, b1, b2, b3,
                   place(k_tile, warp * (TOKENS / WARPS) + n * 8 + (mi >> 1) * 8 + l8, 2 * k + (mi & 1), PIECES));
          mma(c[n][0], c[n][1], c[n][2], c[n][3], a0, a1, a2, a3, b0, b1);
          mma(c[n + 1][0], c[n + 1][1], c[n + 1][2], c[n + 1][3], a0, a1, a2, a3, b2, b3);
        }
      }
      float top[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
      for (int n = 0; n < NTILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int q = m0 + g + (i >> 1) * 8, at = position + q / group;
          const int p = begin + warp * (TOKENS / WARPS) + n * 8 + 2 * t + (i & 1);
          if (!sees(at, p, window)) c[n][i] = NEGATIVE_INFINITY;
          top[i >> 1] = fmaxf(top[i >> 1], c[n][i]);
        }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = fmaxf(top[h], shuffle_xor(top[h], 1));
        top[h] = fmaxf(top[h], shuffle_xor(top[h], 2));
        if (t == 0) tile_max[warp * 16 + h * 8 + g] = top[h];
      }
      BARRIER_BLOCK();
      float sum[2] = {0.f, 0.f}, peak[2], base[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = tile_max[h * 8 + g];
#pragma unroll
        for (int i = 1; i < WARPS; ++i) top[h] = fmaxf(top[h], tile_max[i * 16 + h * 8 + g]);
        peak[h] = peak_of(top[h], scale);
        base[h] = base_of(peak[h]);
      }
#pragma unroll
      for (int n = 0; n < NTILES; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float x = weight_of(c[n][h * 2], scale, base[h]);
          const float y = weight_of(c[n][h * 2 + 1], scale, base[h]);
          sum[h] += x + y;
          const int column = warp * (TOKENS / WARPS) + n * 8 + 2 * t;
          *(u32*)(place(p_tile, h * 8 + g, column / 8, TOKENS / 8) + column % 8) = pack(x, y);
        }
#pragma unroll
      for (int h = 0; h < 2; ++h) ((float*)(tile_sum + warp * 16 + h * 8 + g))[t] = sum[h];
      BARRIER_BLOCK();

      // Values: each warp HEAD_DIM / WARPS columns of all tokens.
      float o[OUT_PIECES][4];
#pragma unroll
      for (int n = 0; n < OUT_PIECES; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;
#pragma unroll
      for (int k = 0; k < TOKENS / 16; ++k) {
        u32 a0, a1, a2, a3;
        ldmatrix(a0, a1, a2, a3, place(p_tile, (mi & 1) * 8 + l8, 2 * k + (mi >> 1), TOKENS / 8));
#pragma unroll
        for (int n = 0; n < OUT_PIECES; n += 2) {
          u32 b0, b1, b2, b3;
          ldmatrix_transposed(b0, b1, b2, b3,
                              place(v_tile, k * 16 + (mi & 1) * 8 + l8, warp * OUT_PIECES + n + (mi >> 1), PIECES));
          mma(o[n][0], o[n][1], o[n][2], o[n][3], a0, a1, a2, a3, b0, b1);
          mma(o[n + 1][0], o[n + 1][1], o[n + 1][2], o[n + 1][3], a0, a1, a2, a3, b2, b3);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int q = m0 + h * 8 + g;
        if (q >= queries) continue;
        float4 sums = tile_sum[h * 8 + g];
#pragma unroll
        for (int i = 1; i < WARPS; ++i) {
          const float4 next = tile_sum[i * 16 + h * 8 + g];
          sums.x += next.x, sums.y += next.y, sums.z += next.z, sums.w += next.w;
        }
        const float total = (sums.x + sums.y) + (sums.z + sums.w);
        if (cuts == 1) {
          const float share = 1.f / total;
          elem* to = out + (size_t)(first + q / group) * heads * HEAD_DIM + (head * group + q % group) * HEAD_DIM;
#pragma unroll
          for (int n = 0; n < OUT_PIECES; ++n)
            *(u32*)(to + (warp * OUT_PIECES + n) * 8 + 2 * t) = pack(o[n][h * 2] * share, o[n][h * 2 + 1] * share);
        } else {
          const size_t at = (size_t)item * row_capacity + q;
          if (warp == 0 && t == 0) partial_stats[at] = make_float4(peak[h], total, 0.f, 0.f);
#pragma unroll
          for (int n = 0; n < OUT_PIECES; ++n)
            *(float2*)(partial + at * HEAD_DIM + (warp * OUT_PIECES + n) * 8 + 2 * t) =
                make_float2(o[n][h * 2], o[n][h * 2 + 1]);
        }
      }
    }

    // Whether this block is the last of `all`; then it sees what the others have written.
    auto arrives_last = [&](int* counter, int all) {
      __threadfence();
      BARRIER_BLOCK();
      if (tid == 0) {
        *flag = atomicAdd(counter, 1) == all - 1;
        if (*flag) *counter = 0;
      }
      BARRIER_BLOCK();
      if (*flag) __threadfence();
      return *flag != 0;
    };
    auto fold_cuts = [&](int from, int stride, int count, bool of_spans, bool last) {
      const Cuts at = {partial, partial_stats, out, before + head, (size_t)kv_heads * row_capacity,
                       row_capacity, from, stride, count, queries, first, group, head, heads, of_spans, last};
      if (queries * COLUMNS > THREADS / 2) combine<THREADS>(at, (uint4*)k_tile, (float4*)q_tile, tid);
      else if (queries * COLUMNS > THREADS / 4) combine<THREADS / 2>(at, (uint4*)k_tile, (float4*)q_tile, tid);
      else combine<THREADS / 4>(at, (uint4*)k_tile, (float4*)q_tile, tid);
    };
    if (cuts > 1) {
      const int skipped = first_seen(position, window) / TOKENS % SPAN;    // cuts that the first span lacks
      const int span = (skipped + cut) / SPAN, spans = (skipped + cuts - 1) / SPAN + 1;
      const int from = max(0, span * SPAN - skipped), until = min(cuts, (span + 1) * SPAN - skipped);
      int* of_span = counters + MAX_BATCH * kv_heads + before + from * kv_heads + head;
      if (arrives_last(of_span, until - from)) {
        fold_cuts(from, 1, until - from, false, spans == 1);
        if (spans > 1 && arrives_last(counters + s * kv_heads + head, spans))
          fold_cuts(-skipped, SPAN, spans, true, true);
      }
    }
    BARRIER_BLOCK();
  }
  if (!waited) wait_for_previous();
}
