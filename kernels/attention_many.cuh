// What both kernels of spans of many rows stand on (attention_many.cu, attention_wgmma.cu): who takes
// what, the weights of a cut, and what is kept from cut to cut.
//
// A warp has tiles of 16 packed queries, and lane 4 g + t of it the rows g and g + 8 (`h` 0 and 1), of
// these the columns 2 t and 2 t + 1 of every 8: [column / 8][2 h + column % 2].
#pragma once
#include "attention.cuh"

#define NTILES (TOKENS / 8)             // 8-token score tiles

// The sequences with their tiles of so many queries, in the order in which they are taken, at `about`
// [MAX_BATCH]; behind it room for as many ints. All threads of the block, at least `batch`.
// What takes longest comes first: the sequences that reach farthest, and of each its last rows.
DEVICE void order_sequences(Sequence* about, const Sequences& from, int batch, int group, int tile) {
  int* ends = (int*)(about + MAX_BATCH);
  const int s = threadIdx.x;
  Sequence mine;
  if (s < batch) {
    mine = load_sequence(from, s);
    mine.units = (mine.rows * group + tile - 1) / tile;
    ends[s] = mine.position + mine.rows;
  }
  BARRIER_BLOCK();
  if (s < batch) {
    int farther = 0;
    for (int i = 0; i < batch; ++i) farther += ends[i] > ends[s] || (ends[i] == ends[s] && i < s);
    about[farther] = mine;
  }
  BARRIER_BLOCK();
}

// One work item: packed queries from q0 on, of a KV head of a sequence.
struct Item {
  const Sequence* own;
  int group, head, q0, queries;   // `queries`: how many the sequence has of the head
};
// A block's items. Every other round over the blocks goes backwards, so that who had most has least next.
struct Items {
  const Sequence* about;
  int batch, group, kv_heads, tile;
  int round, before, s;           // `before`: items of the sequences before s
};
DEVICE bool next_item(Items& all, Item& item) {
  const int round = all.round++;
  const int number = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  while (all.s < all.batch && number >= all.before + all.about[all.s].units * all.kv_heads)
    all.before += all.about[all.s++].units * all.kv_heads;
  if (all.s >= all.batch) return false;
  item.own = all.about + all.s;
  item.group = all.group;
  item.head = (number - all.before) % all.kv_heads;
  item.q0 = (item.own->units - 1 - (number - all.before) / all.kv_heads) * all.tile;
  item.queries = item.own->rows * all.group;
  return true;
}
// The position of a query, and where its row begins in a matrix of `columns` columns.
DEVICE int position_of(const Item& item, int q) {
  return item.own->position + min(q, item.queries - 1) / item.group;
}
DEVICE size_t row_of(const Item& item, int q, int columns) {
  return (size_t)(item.own->first + q / item.group) * columns +
         (item.head * item.group + q % item.group) * HEAD_DIM;
}

// The first and the last cut that `count` queries from q on see.
struct Cuts {
  int first, last;
};
DEVICE Cuts cuts_of(const Item& item, int q, int count, int window) {
  const Cuts seen = {first_seen(position_of(item, q), window) / TOKENS,
                     position_of(item, q + count - 1) / TOKENS};
  return seen;
}

// The slot of the first token of a cut that is written to its end and lies in one piece, else -1.
DEVICE int slot_of_whole(const Sequence& where, int ring, int begin) {
  const bool parted = begin < where.prefix_len && begin + TOKENS > where.prefix_len;
  if (parted || where.position + where.rows < begin + TOKENS) return -1;
  const int slot = slot_of(where, ring, begin);
  return slot_of(where, ring, begin + TOKENS - 1) == slot + TOKENS - 1 ? slot : -1;
}

// What a lane's rows of a tile of queries have come to.
struct Sums {
  float y[PIECES][4], top[2], total[2];
};
DEVICE void clear(Sums& sums) {
#pragma unroll
  for (int n = 0; n < PIECES; ++n) sums.y[n][0] = sums.y[n][1] = sums.y[n][2] = sums.y[n][3] = 0.f;
#pragma unroll
  for (int h = 0; h < 2; ++h) sums.top[h] = NEGATIVE_INFINITY, sums.total[h] = 0.f;
}
// What the spans before came to waits outside the registers (`keep_in_memory`): it is needed once a span.
DEVICE void join_past(Sums& sums, const Sums& past) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float highest = past.top[h];
    const Fold f = fold(highest, sums.top[h]);
    sums.top[h] = highest;
    sums.total[h] = folded(past.total[h], sums.total[h], f);
#pragma unroll
    for (int n = 0; n < PIECES; ++n)
#pragma unroll
      for (int i = h * 2; i < h * 2 + 2; ++i) sums.y[n][i] = folded(past.y[n][i], sums.y[n][i], f);
  }
}
DEVICE void begin_span(Sums& sums, Sums& past, bool has_past) {
  if (has_past) join_past(sums, past);
  past = sums;
  clear(sums);
}

// Hides the scores of a cut that the row at `at` may not see.
DEVICE void hide(float (&c)[NTILES][4], int h, int at, int begin, int t, int window) {
#pragma unroll
  for (int n = 0; n < NTILES; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (!sees(at, begin + n * 8 + 2 * t + i, window)) c[n][h * 2 + i] = NEGATIVE_INFINITY;
}

// The weights of a cut, rounded, for the product with its values; their sum goes into `sums`, and
// `folds` tells how the values will.
DEVICE void weigh(const float (&c)[NTILES][4], float scale, u32 (&weights)[NTILES][2], Sums& sums,
                  Fold (&folds)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float highest = NEGATIVE_INFINITY;
#pragma unroll
    for (int n = 0; n < NTILES; ++n) highest = fmaxf(highest, fmaxf(c[n][h * 2], c[n][h * 2 + 1]));
    highest = fmaxf(highest, shuffle_xor(highest, 1));
    highest = fmaxf(highest, shuffle_xor(highest, 2));
    const float peak = peak_of(highest, scale), base = base_of(peak);
    float sum = 0.f;
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
      float own_sum = 0.f;
#pragma unroll
      for (int n = slice * (NTILES / SLICES); n < (slice + 1) * (NTILES / SLICES); ++n) {
        const float x = weight_of(c[n][h * 2], scale, base);
        const float z = weight_of(c[n][h * 2 + 1], scale, base);
        own_sum += x + z;
        weights[n][h] = pack(x, z);
      }
      sum += own_sum;
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    folds[h] = fold(sums.top[h], peak);
    sums.total[h] = folded(sums.total[h], sum, folds[h]);
  }
}

// The values of a cut, 8 N columns from piece `first` on.
template <int N> DEVICE void fold_values(Sums& sums, int first, const float (&o)[N][4], const Fold (&folds)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.y[first + n][i] = folded(sums.y[first + n][i], o[n][i], folds[i >> 1]);
}
