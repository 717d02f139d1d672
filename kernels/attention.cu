// Attention of a ragged batch over the KV arena, with rotary embedding and the append of
// the new rows' keys and values folded in.
//
// Each sequence brings `rows` query rows at positions position .. position + rows - 1; their
// q, k, v come raw from the projection. KV is cut at fixed multiples of TOKENS positions. One
// work item = (sequence, TOKENS positions, KV head): it embeds and stores the new keys and
// values that fall into its cut, attends all query rows of its head group to the cut, and
// the last item of a (sequence, KV head) to finish combines the cuts in ascending order.
// A cut that a row may not see adds exactly nothing (weight 0), so a row's bits depend
// neither on the rows beside it nor on the batch.
// `position_offset` is added to every position: the steps of a draft loop share one buffer.
//
// -D: HEAD_DIM (64, 128, 256), TOKENS (64, 128).
#include "prelude.cuh"

#define WARPS 4
#define THREADS (WARPS * 32)
#define PIECES (HEAD_DIM / 8)           // 16-byte pieces of a row
#define HALF_PER_LANE (HEAD_DIM / 64)   // elements of each half of a head that a lane embeds
#define NTILES (TOKENS / WARPS / 8)     // 8-token score tiles of a warp
#define OUT_PIECES (PIECES / WARPS)     // output columns of a warp, in eights
#define MAX_BATCH 64

// Rows of 16-byte pieces, the piece's place scrambled by the row against bank conflicts.
DEVICE elem* place(elem* base, int row, int piece, int pieces) {
  return base + (row * pieces + (piece ^ (row & 7))) * 8;
}

// A lane's elements of one head row: l * HALF_PER_LANE + i of each half, as they were stored.
struct Raw {
  elem low[HALF_PER_LANE], high[HALF_PER_LANE];
};
DEVICE void load_raw(Raw& raw, const elem* from, int lane) {
#pragma unroll
  for (int i = 0; i < HALF_PER_LANE; ++i) {
    raw.low[i] = load_fresh(from + lane * HALF_PER_LANE + i);
    raw.high[i] = load_fresh(from + HEAD_DIM / 2 + lane * HALF_PER_LANE + i);
  }
}
struct Turn {
  float2 by[HALF_PER_LANE];
};
DEVICE void load_turn(Turn& turn, const float2* rope, int p, int lane) {
#pragma unroll
  for (int i = 0; i < HALF_PER_LANE; ++i)
    turn.by[i] = rope[(size_t)p * (HEAD_DIM / 2) + lane * HALF_PER_LANE + i];
}

// One warp: a head row, normalised where `weight` is given and rotated, into row `to` of a tile
// and, where `store` is given, to device memory.
DEVICE void embed(const Raw& raw, const Turn& turn, const elem* weight, float eps, int lane,
                  elem* tile, int row, elem* store) {
  float low[HALF_PER_LANE], high[HALF_PER_LANE];
  const int i0 = lane * HALF_PER_LANE;
#pragma unroll
  for (int i = 0; i < HALF_PER_LANE; ++i) {
    low[i] = to_float(raw.low[i]);
    high[i] = to_float(raw.high[i]);
  }
  if (weight) {
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < HALF_PER_LANE; ++i) s += low[i] * low[i] + high[i] * high[i];
#pragma unroll
    for (int m = 16; m > 0; m >>= 1) s += shuffle_xor(s, m);
    const float scale = rsqrtf(s / (float)HEAD_DIM + eps);
#pragma unroll
    for (int i = 0; i < HALF_PER_LANE; ++i) {
      low[i] = round_elem(to_float(weight[i0 + i]) * round_elem(low[i] * scale));
      high[i] = round_elem(to_float(weight[HEAD_DIM / 2 + i0 + i]) * round_elem(high[i] * scale));
    }
  }
#pragma unroll
  for (int i = 0; i < HALF_PER_LANE; ++i) {
    const float c = turn.by[i].x, s = turn.by[i].y;
    const elem a = from_float(low[i] * c - high[i] * s), b = from_float(high[i] * c + low[i] * s);
    const int x = i0 + i, y = x + HEAD_DIM / 2;
    place(tile, row, x / 8, PIECES)[x % 8] = a;
    place(tile, row, y / 8, PIECES)[y % 8] = b;
    if (store) {
      store[x] = a;
      store[y] = b;
    }
  }
}

#define QUERIES_PER_WARP (16 / WARPS)
#define NEW_AT_ONCE 2

struct Cuts {   // where the partial results of one (sequence, KV head) lie and go
  const float* partial;
  const float2* stats;
  elem* out;
  int first_item;
  size_t step;
  int row_capacity, cuts, queries, first_row, group, head, heads;
};

// Adds up the cuts in ascending order. A thread makes four columns of QUERIES rows at a time,
// BATCH cuts on their way at once; neither number changes a bit.
template <int QUERIES, int BATCH> DEVICE void combine(const Cuts& c, int tid) {
  const int all = c.queries * (HEAD_DIM / 4);
  for (int e0 = tid; e0 < all; e0 += QUERIES * THREADS) {
    float top[QUERIES], total[QUERIES], y[QUERIES][4];
    size_t at0[QUERIES];
    int column[QUERIES];
#pragma unroll
    for (int n = 0; n < QUERIES; ++n) {
      const int e = min(e0 + n * THREADS, all - 1);
      column[n] = e % (HEAD_DIM / 4) * 4;
      at0[n] = (size_t)c.first_item * c.row_capacity + e / (HEAD_DIM / 4);
      top[n] = NEGATIVE_INFINITY;
      total[n] = y[n][0] = y[n][1] = y[n][2] = y[n][3] = 0.f;
    }
    for (int i0 = 0; i0 < c.cuts; i0 += BATCH) {
      float peak[QUERIES][BATCH], sum[QUERIES][BATCH];
      uint4 v[QUERIES][BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
#pragma unroll
        for (int n = 0; n < QUERIES; ++n) {
          const size_t at = at0[n] + min(i0 + i, c.cuts - 1) * c.step;
          peak[n][i] = load_fresh((const float*)(c.stats + at));
          sum[n][i] = load_fresh((const float*)(c.stats + at) + 1);
          v[n][i] = load_fresh((const uint4*)(c.partial + at * HEAD_DIM + column[n]));
        }
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (i0 + i < c.cuts)
#pragma unroll
          for (int n = 0; n < QUERIES; ++n) {
            const float higher = fmaxf(top[n], peak[n][i]);
            const float base = higher == NEGATIVE_INFINITY ? 0.f : higher;
            const float old = exp2_fast(top[n] - base), weight = exp2_fast(peak[n][i] - base);
            top[n] = higher;
            total[n] = fmaf(total[n], old, weight * sum[n][i]);
            y[n][0] = fmaf(y[n][0], old, weight * __uint_as_float(v[n][i].x));
            y[n][1] = fmaf(y[n][1], old, weight * __uint_as_float(v[n][i].y));
            y[n][2] = fmaf(y[n][2], old, weight * __uint_as_float(v[n][i].z));
            y[n][3] = fmaf(y[n][3], old, weight * __uint_as_float(v[n][i].w));
          }
    }
#pragma unroll
    for (int n = 0; n < QUERIES; ++n) {
      const int e = e0 + n * THREADS, q = e / (HEAD_DIM / 4);
      if (e >= all) continue;
      const size_t row = (size_t)(c.first_row + q / c.group) * c.heads + c.head * c.group + q % c.group;
      *(uint2*)(c.out + row * HEAD_DIM + column[n]) =
          make_uint2(pack(y[n][0] / total[n], y[n][1] / total[n]), pack(y[n][2] / total[n], y[n][3] / total[n]));
    }
  }
}

ENTRY void __launch_bounds__(THREADS, HEAD_DIM <= 128 && TOKENS <= 64 ? 4 : 1)
    attention(const elem* __restrict__ qkv, elem* keys, elem* values, elem* __restrict__ out,
              const int* starts, const int* first_rows, const int* row_counts,
              const int* positions, int position_offset, const float2* __restrict__ rope,
              const elem* __restrict__ q_norm, const elem* __restrict__ k_norm, float eps,
              float* partial, float2* partial_stats, int* counters, int batch, int heads,
              int kv_heads, int row_capacity, int window, int ring, float scale) {
  DYNAMIC_SHARED(memory);
  elem* k_tile = (elem*)memory;
  elem* v_tile = k_tile + TOKENS * HEAD_DIM;
  elem* q_tile = v_tile + TOKENS * HEAD_DIM;
  elem* p_tile = q_tile + 16 * HEAD_DIM;
  float* tile_max = (float*)(p_tile + 16 * TOKENS);     // [WARPS][16]
  float* tile_sum = tile_max + WARPS * 16;
  int* about = (int*)(tile_sum + WARPS * 16);           // [MAX_BATCH][5]
  int* flag = about + MAX_BATCH * 5;
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int group = heads / kv_heads, stride = (heads + 2 * kv_heads) * HEAD_DIM;

  let_next_start();
  for (int s = tid; s < batch; s += THREADS) {
    const int rows = load_fresh(row_counts + s), p = load_fresh(positions + s) + position_offset;
    const int first = load_fresh(first_rows + s), start = load_fresh(starts + s);
    const int low = window > 0 ? max(0, p - window + 1) : 0;
    about[s * 5] = rows > 0 ? (p + rows - 1) / TOKENS - low / TOKENS + 1 : 0;
    about[s * 5 + 1] = rows;
    about[s * 5 + 2] = p;
    about[s * 5 + 3] = first;
    about[s * 5 + 4] = start;
  }
  BARRIER_BLOCK();

  bool waited = false;
  int before = 0, s = 0;     // items of the sequences before s
  for (int item = blockIdx.x;; item += gridDim.x) {
    while (s < batch && item >= before + about[s * 5] * kv_heads) before += about[s++ * 5] * kv_heads;
    if (s >= batch) break;
    const int cuts = about[s * 5], head = (item - before) % kv_heads, cut = (item - before) / kv_heads;
    const int rows = about[s * 5 + 1], position = about[s * 5 + 2];
    const int first = about[s * 5 + 3], start = about[s * 5 + 4];
    const int low = window > 0 ? max(0, position - window + 1) : 0;
    const int begin = (low / TOKENS + cut) * TOKENS, end = position + rows;
    const int queries = rows * group;
    auto arena_at = [&](int p) {
      return ((size_t)(start + (ring > 0 ? p % ring : p)) * kv_heads + head) * HEAD_DIM;
    };
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
    Raw q_raw[QUERIES_PER_WARP];
    auto load_queries = [&](int m0) {
#pragma unroll
      for (int j = 0; j < QUERIES_PER_WARP; ++j)
        load_raw(q_raw[j], query_at(min(m0 + warp + j * WARPS, queries - 1)), lane);
    };
    load_queries(0);

    // New tokens of this cut: embed, keep for this item, store in the arena.
    for (int p0 = new_begin + warp; p0 < new_end; p0 += WARPS * NEW_AT_ONCE) {
      Raw k_raw[NEW_AT_ONCE], v_raw[NEW_AT_ONCE];
#pragma unroll
      for (int j = 0; j < NEW_AT_ONCE; ++j) {
        const int p = min(p0 + j * WARPS, new_end - 1);
        const elem* row = qkv + (size_t)(first + p - position) * stride;
        load_raw(k_raw[j], row + (heads + head) * HEAD_DIM, lane);
        load_raw(v_raw[j], row + (heads + kv_heads + head) * HEAD_DIM, lane);
        if (p0 != new_begin + warp) load_turn(k_turn[j], rope, p, lane);
      }
#pragma unroll
      for (int j = 0; j < NEW_AT_ONCE; ++j) {
        const int p = p0 + j * WARPS, token = p - begin;
        if (p >= new_end) continue;
        const size_t at = arena_at(p);
        embed(k_raw[j], k_turn[j], k_norm, eps, lane, k_tile, token, keys + at);
#pragma unroll
        for (int i = 0; i < HALF_PER_LANE; ++i) {
          const int x = lane * HALF_PER_LANE + i, y = x + HEAD_DIM / 2;
          place(v_tile, token, x / 8, PIECES)[x % 8] = values[at + x] = v_raw[j].low[i];
          place(v_tile, token, y / 8, PIECES)[y % 8] = values[at + y] = v_raw[j].high[i];
        }
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
        embed(q_raw[j], q_turn[j], q_norm, eps, lane, q_tile, warp + j * WARPS, nullptr);
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
          const bool seen = q < queries && p <= at && (window <= 0 || p > at - window);
          c[n][i] = seen ? c[n][i] * scale : NEGATIVE_INFINITY;
          top[i >> 1] = fmaxf(top[i >> 1], c[n][i]);
        }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = fmaxf(top[h], shuffle_xor(top[h], 1));
        top[h] = fmaxf(top[h], shuffle_xor(top[h], 2));
        if (t == 0) tile_max[warp * 16 + h * 8 + g] = top[h];
      }
      BARRIER_BLOCK();
      float sum[2] = {0.f, 0.f};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = tile_max[h * 8 + g];
#pragma unroll
        for (int i = 1; i < WARPS; ++i) top[h] = fmaxf(top[h], tile_max[i * 16 + h * 8 + g]);
      }
#pragma unroll
      for (int n = 0; n < NTILES; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool none = top[h] == NEGATIVE_INFINITY;
          const float x = none ? 0.f : exp2_fast(c[n][h * 2] - top[h]);
          const float y = none ? 0.f : exp2_fast(c[n][h * 2 + 1] - top[h]);
          sum[h] += x + y;
          const int column = warp * (TOKENS / WARPS) + n * 8 + 2 * t;
          *(u32*)(place(p_tile, h * 8 + g, column / 8, TOKENS / 8) + column % 8) = pack(x, y);
        }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] += shuffle_xor(sum[h], 1);
        sum[h] += shuffle_xor(sum[h], 2);
        if (t == 0) tile_sum[warp * 16 + h * 8 + g] = sum[h];
      }
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
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) total += tile_sum[i * 16 + h * 8 + g];
        if (cuts == 1) {
          elem* to = out + (size_t)(first + q / group) * heads * HEAD_DIM + (head * group + q % group) * HEAD_DIM;
#pragma unroll
          for (int n = 0; n < OUT_PIECES; ++n)
            *(u32*)(to + (warp * OUT_PIECES + n) * 8 + 2 * t) = pack(o[n][h * 2] / total, o[n][h * 2 + 1] / total);
        } else {
          const size_t at = (size_t)item * row_capacity + q;
          if (warp == 0 && t == 0) partial_stats[at] = make_float2(top[h], total);
#pragma unroll
          for (int n = 0; n < OUT_PIECES; ++n)
            *(float2*)(partial + at * HEAD_DIM + (warp * OUT_PIECES + n) * 8 + 2 * t) =
                make_float2(o[n][h * 2], o[n][h * 2 + 1]);
        }
      }
    }

    if (cuts > 1) {
      __threadfence();
      BARRIER_BLOCK();
      if (tid == 0) {
        const int arrived = atomicAdd(counters + s * kv_heads + head, 1);
        *flag = arrived == cuts - 1;
        if (arrived == cuts - 1) counters[s * kv_heads + head] = 0;
      }
      BARRIER_BLOCK();
      if (*flag) {
        __threadfence();
        const Cuts at = {partial, partial_stats, out, before + head, (size_t)kv_heads * row_capacity,
                         row_capacity, cuts, queries, first, group, head, heads};
        if (queries * (HEAD_DIM / 4) <= THREADS) combine<1, 8>(at, tid);
        else combine<2, 4>(at, tid);
      }
    }
    BARRIER_BLOCK();
  }
  if (!waited) wait_for_previous();
}
