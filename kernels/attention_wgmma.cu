// `attend` (attention_many.cu) with Hopper's products, for heads of 64 and 128 columns.
//
// One work item = (sequence, TILE packed queries of a KV head, query = row * group + head in the
// group). Each of CONSUMERS teams of four warps takes 64 of them. One warp fetches cuts for all: the
// copy engine fills a ring of STAGES, keys and values; and for each team one warp fetches queries, the
// next ones as soon as the last scores are made. While a team weighs the scores of a cut the tensor
// cores make those of the next, and while one team weighs they multiply for the others.
//
// A row's bits are those of attention.cu: see attention.cuh.
//
// -D: see attention.cuh, TOKENS 64.
#include "attention_many.cuh"
#include "hopper.cuh"

#define CONSUMERS 2
#define STAGES 4
#define TILE (CONSUMERS * 64)
#define HALVES (HEAD_DIM / 64)          // tiles of 64 columns that a head has
#define TILE_BYTES (64 * 128)
#define HEAD_BYTES (HALVES * TILE_BYTES)
#define STAGE (2 * HEAD_BYTES)          // keys, then values
// Registers of a thread; the launch gives all the same.
#define FETCHING (HEAD_DIM == 64 ? 56 : 40)
#define MULTIPLYING (HEAD_DIM == 64 ? 224 : 232)

// Where the copy engine puts 16-byte piece `piece` of a head's row.
DEVICE int byte_of(int row, int piece) {
  return piece / 8 * TILE_BYTES + row * 128 + ((piece ^ row) & 7) * 16;
}

ENTRY void __launch_bounds__(CONSUMERS * 128 + 128, 1)
    attend(const elem* qkv, const elem* keys, const elem* values, const void* keys_map,
           const void* values_map, elem* __restrict__ out, const int* starts,
           const int* prefix_starts, const int* prefix_lens, const int* first_rows,
           const int* row_counts, const int* positions, int position_offset, int batch, int heads,
           int kv_heads, int window, int ring, float scale) {
  DYNAMIC_SHARED(memory);
  unsigned char* stages = memory + (-(long long)memory & 1023);     // [STAGES]
  unsigned char* queries = stages + STAGES * STAGE;                 // [CONSUMERS]
  u64* full = (u64*)(queries + CONSUMERS * HEAD_BYTES);
  u64* empty = full + STAGES;
  u64* asked = empty + STAGES;            // of each team: its queries are there
  u64* answered = asked + CONSUMERS;      // and are no more needed
  Sequence* about = (Sequence*)(answered + CONSUMERS);              // [MAX_BATCH], units: tiles
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int group = heads / kv_heads, stride = (heads + 2 * kv_heads) * HEAD_DIM;
  let_next_start();
  if (tid == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, CONSUMERS * 4);
    }
    for (int i = 0; i < CONSUMERS; ++i) {
      barrier_init(asked + i, 1);
      barrier_init(answered + i, 4);
    }
    barrier_init_done();
  }
  wait_for_previous();
  const Sequences from = {starts, prefix_starts, prefix_lens, first_rows, row_counts, positions, position_offset};
  order_sequences(about, from, batch, group, TILE);

  Items items = {about, batch, group, kv_heads, TILE, 0, 0, 0};
  Item item;
  u32 turn = 0;    // cuts before this one, over all items
  u32 asking = 0;  // items before this one, in which the team has queries
  // Products can read what the warp has copied.
  auto landed = [&](u64* barrier) {
    copy_commit();
    copy_wait<0>();
    show_to_products();
    BARRIER_WARP();
    if (lane == 0) barrier_arrive(barrier);
  };
  auto fetch_cuts = [&] {
    while (next_item(items, item)) {
      const Cuts cuts = cuts_of(item, item.q0, TILE, window);
#pragma unroll 1
      for (int cut = cuts.first; cut <= cuts.last; ++cut, ++turn) {
        const Sequence where = *item.own;
        unsigned char* k = stages + turn % STAGES * STAGE;
        unsigned char* v = k + HEAD_BYTES;
        u64* filled = full + turn % STAGES;
        const int begin = cut * TOKENS, slot = slot_of_whole(where, ring, begin);
        barrier_wait(empty + turn % STAGES, (turn / STAGES & 1) ^ 1);
        if (slot >= 0) {
          if (lane > 0) continue;
          barrier_expect(filled, STAGE);
          for (int half = 0; half < HALVES; ++half)
            copy_tile(k + half * TILE_BYTES, keys_map, item.head * HEAD_DIM + half * 64, slot, filled);
          for (int half = 0; half < HALVES; ++half)
            copy_tile(v + half * TILE_BYTES, values_map, item.head * HEAD_DIM + half * 64, slot, filled);
        } else {
          // Tokens beyond the written ones are zero: what weighs nothing must be a number too.
          const int left = where.position + where.rows - begin;
#pragma unroll 1
          for (int e = lane; e < TOKENS * PIECES; e += 32) {
            const int token = e / PIECES, to = byte_of(token, e % PIECES);
            const int from = slot_of(where, ring, begin + min(token, left - 1));
            const size_t at = ((size_t)from * kv_heads + item.head) * HEAD_DIM + e % PIECES * 8;
            copy16(k + to, keys + at, token < left);
            copy16(v + to, values + at, token < left);
          }
          landed(filled);
        }
      }
    }
  };
  auto fetch_queries = [&](int team) {
    unsigned char* query = queries + team * HEAD_BYTES;
    while (next_item(items, item)) {
      const int q0 = item.q0 + team * 64;
      if (q0 >= item.queries) continue;
      barrier_wait(answered + team, (asking++ & 1) ^ 1);
#pragma unroll 4
      for (int e = lane; e < 64 * PIECES; e += 32) {
        const int q = q0 + e / PIECES;
        copy16(query + byte_of(e / PIECES, e % PIECES),
               qkv + (q < item.queries ? row_of(item, q, stride) + e % PIECES * 8 : 0), q < item.queries);
      }
      landed(asked + team);
    }
  };
  if (warp >= CONSUMERS * 4) {
    give_registers<FETCHING>();
    const int fetcher = warp - CONSUMERS * 4;
    if (fetcher == 0) fetch_cuts();
    else if (fetcher <= CONSUMERS) fetch_queries(fetcher - 1);
    return;
  }

  take_registers<MULTIPLYING>();
  const int team = warp / 4, g = lane >> 2, t = lane & 3;
  unsigned char* query = queries + team * HEAD_BYTES;
  auto release = [&] {
    if (lane == 0) barrier_arrive(empty + turn % STAGES);
    ++turn;
  };
  // Cuts that others of the block see.
  auto leave_out = [&](int cuts) {
#pragma unroll 1
    for (; cuts > 0; --cuts) {
      barrier_wait(full + turn % STAGES, turn / STAGES & 1);
      release();
    }
  };
  auto begin_scores = [&](float (&c)[NTILES][4], u32 turn) {
    const Operand q = operand(query), k = operand(stages + turn % STAGES * STAGE);
    barrier_wait(full + turn % STAGES, turn / STAGES & 1);
    product_begin();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
      const int at = step / 4 * TILE_BYTES + step % 4 * 32;
      product(c, q + at, k + at, step > 0);
    }
    product_commit();
  };
#pragma unroll 1
  while (next_item(items, item)) {
    const int q0 = item.q0 + team * 64;
    const Cuts cuts = cuts_of(item, item.q0, TILE, window);
    if (q0 >= item.queries) {
      leave_out(cuts.last + 1 - cuts.first);
      continue;
    }
    const Cuts own = cuts_of(item, q0, 64, window);
    const int row = q0 + warp % 4 * 16;    // of the warp
    const int warp_first = position_of(item, row), warp_last = position_of(item, row + 15);
    const int at[2] = {position_of(item, row + g), position_of(item, row + 8 + g)};

    Sums sums;
    clear(sums);
    Sums past;
    keep_in_memory(&past);
    bool has_past = false;
    // Of the cut whose scores are in c.
    auto take = [&](float (&c)[NTILES][4], int cut) {
      if (cut % SPAN == 0 && cut > own.first) {
        begin_span(sums, past, has_past);
        has_past = true;
      }
      const int begin = cut * TOKENS;
      if (begin + TOKENS - 1 > warp_first || first_seen(warp_last, window) > begin) {
#pragma unroll
        for (int h = 0; h < 2; ++h) hide(c, h, at[h], begin, t, window);
      }
      u32 weights[NTILES][2];
      Fold folds[2];
      weigh(c, scale, weights, sums, folds);

      float o[HALVES][8][4];
      const Operand v = operand(stages + turn % STAGES * STAGE + HEAD_BYTES);
      product_begin();
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
#pragma unroll
        for (int k = 0; k < TOKENS / 16; ++k)
          product_by_rows(o[half], weights[2 * k], weights[2 * k + 1], v + half * TILE_BYTES + k * 16 * 128, k > 0);
        product_commit();
      }
      if (HALVES == 2) {
        product_wait<1>();
        product_end(o[0]);
        fold_values(sums, 0, o[0], folds);
      }
      product_wait<0>();
      product_end(o[HALVES - 1]);
      release();
      fold_values(sums, (HALVES - 1) * 8, o[HALVES - 1], folds);
    };
    // Of that cut, while the scores of the one behind it come into `next`.
    auto take_and_begin = [&](float (&c)[NTILES][4], float (&next)[NTILES][4], int cut) {
      begin_scores(next, turn + 1);
      take(c, cut);
      product_end(next);
    };

    // All scores are made.
    auto answer = [&] {
      if (lane == 0) barrier_arrive(answered + team);
    };

    leave_out(own.first - cuts.first);
    barrier_wait(asked + team, asking++ & 1);
    float even[NTILES][4], odd[NTILES][4];
    begin_scores(even, turn);
    product_wait<0>();
    product_end(even);
#pragma unroll 1
    for (int cut = own.first;;) {
      if (cut == own.last) {
        answer();
        take(even, cut);
        break;
      }
      take_and_begin(even, odd, cut++);
      if (cut == own.last) {
        answer();
        take(odd, cut);
        break;
      }
      take_and_begin(odd, even, cut++);
    }
    leave_out(cuts.last - own.last);
    if (has_past) join_past(sums, past);

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int q = row + h * 8 + g;
      const float share = 1.f / sums.total[h];
#pragma unroll
      for (int quad = 0; quad < PIECES / 4; ++quad) {
        u32 p[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float(&y)[4] = sums.y[quad * 4 + n];
          p[n] = pack(y[h * 2] * share, y[h * 2 + 1] * share);
        }
        transpose(p, t);    // eight columns of the row for each lane
        if (q < item.queries)
          *(uint4*)(out + row_of(item, q, heads * HEAD_DIM) + (quad * 4 + t) * 8) = make_uint4(p[0], p[1], p[2], p[3]);
      }
    }
  }
}
