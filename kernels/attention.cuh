// What all kernels of attention stand on: attention.cu (few rows a sequence), attention_many.cu and
// attention_wgmma.cu (many). They give a row the same bits, because everything that rounds is
// either here or done in the order that is told here:
//
// 1. q and k are normalised, rotated and rounded by `embedded`.
// 2. KV is cut at fixed multiples of TOKENS positions. A cut's scores are tensor-core steps of
//    16 elements of the head, ascending.
// 3. A position weighs `weight_of` its score, relative to the cut's own peak (`peak_of`).
// 4. The sum of a cut's weights: lane t of a row has the columns 2t and 2t + 1 of every 8. In each
//    of SLICES equal slices of the cut it adds up, 8 tokens after 8, the sums of its two columns;
//    then its slices, ascending; then (lane 0 + lane 1) + (lane 2 + lane 3).
// 5. The weights are rounded to the element type, and a cut's values are summed up from zero in
//    tensor-core steps of 16 positions, ascending.
// 6. SPAN cuts, at fixed multiples of their number, are folded together by `fold` and `folded`,
//    ascending; then so are the spans; and the sum of the values is multiplied by 1 / the sum of
//    the weights.
//
// A cut that a row may not see adds exactly nothing: weight 0.
//
// -D: HEAD_DIM (64, 128, 256), TOKENS (64, 128).
#pragma once
#include "prelude.cuh"

#define WARPS 4
#define THREADS (WARPS * 32)
#define SLICES 4
#define SPAN 32
#define PIECES (HEAD_DIM / 8)           // 16-byte pieces of a row
#define HALF_PER_LANE (HEAD_DIM / 64)   // elements of each half of a head that a lane embeds
#define MAX_BATCH 64

// Rows of 16-byte pieces, the piece's place scrambled by the row against bank conflicts.
DEVICE int place_of(int row, int piece, int pieces) { return (row * pieces + (piece ^ (row & 7))) * 8; }
DEVICE elem* place(elem* base, int row, int piece, int pieces) {
  return base + place_of(row, piece, pieces);
}
// `even` pieces further in a row, from the place of its piece 0 or 1.
DEVICE int along(int place, int even) { return place ^ (even * 8); }

// Where the rows of one sequence stand. `units`: what a block takes at a time, as its kernel counts.
struct Sequence {
  int units, rows, position, first, start, prefix_start, prefix_len;
};
// The arrays that Sequences are read from. `prefix_*` are null where nobody has a prefix.
struct Sequences {
  const int *starts, *prefix_starts, *prefix_lens, *first_rows, *row_counts, *positions;
  int position_offset;
};
DEVICE Sequence load_sequence(const Sequences& from, int s) {
  Sequence a;
  a.units = 0;
  a.rows = load_fresh(from.row_counts + s);
  a.position = load_fresh(from.positions + s) + from.position_offset;
  a.first = load_fresh(from.first_rows + s);
  a.start = load_fresh(from.starts + s);
  a.prefix_len = from.prefix_lens ? load_fresh(from.prefix_lens + s) : 0;
  a.prefix_start = a.prefix_len > 0 ? load_fresh(from.prefix_starts + s) : 0;
  return a;
}

// The slot of position p: positions below `prefix_len` lie where another sequence has them.
DEVICE int slot_of(const Sequence& a, int ring, int p) {
  const bool prefix = p < a.prefix_len;
  int place = prefix ? p : p - a.prefix_len;
  if (ring > 0) place %= ring;
  return (prefix ? a.prefix_start : a.start) + place;
}

// The first position that a row at `at` sees, and whether it sees position p.
DEVICE int first_seen(int at, int window) { return window > 0 ? max(0, at - window + 1) : 0; }
DEVICE bool sees(int at, int p, int window) { return p <= at && (window <= 0 || p > at - window); }

// A lane's elements of one head row: lane * HALF_PER_LANE + i of each half.
#if HALF_PER_LANE == 1
typedef elem Half;
typedef elem HalfWord;
#elif HALF_PER_LANE == 2
typedef u32 Half;
typedef u32 HalfWord;
#else
typedef u64 Half;
typedef long long HalfWord;
#endif
struct HeadRow {
  Half low, high;
};
DEVICE elem element(Half half, int i) { return (elem)(half >> (16 * i)); }
DEVICE void load_row(HeadRow& row, const elem* from, int lane) {
  row.low = (Half)load_fresh((const HalfWord*)(from + lane * HALF_PER_LANE));
  row.high = (Half)load_fresh((const HalfWord*)(from + HEAD_DIM / 2 + lane * HALF_PER_LANE));
}
DEVICE void store_row(const HeadRow& row, elem* to, int lane) {
  *(Half*)(to + lane * HALF_PER_LANE) = row.low;
  *(Half*)(to + HEAD_DIM / 2 + lane * HALF_PER_LANE) = row.high;
}
DEVICE void place_row(const HeadRow& row, elem* tile, int at, int lane) {
  const int x = lane * HALF_PER_LANE, y = x + HEAD_DIM / 2;
  *(Half*)(place(tile, at, x / 8, PIECES) + x % 8) = row.low;
  *(Half*)(place(tile, at, y / 8, PIECES) + y % 8) = row.high;
}

struct Turn {
  float2 by[HALF_PER_LANE];
};
DEVICE void load_turn(Turn& turn, const float2* rope, int p, int lane) {
#pragma unroll
  for (int i = 0; i < HALF_PER_LANE; ++i)
    turn.by[i] = rope[(size_t)p * (HEAD_DIM / 2) + lane * HALF_PER_LANE + i];
}

// One warp: a head row, normalised where `weight` is given, rotated and rounded.
DEVICE HeadRow embedded(const HeadRow& raw, const Turn& turn, const elem* weight, float eps, int lane) {
  float low[HALF_PER_LANE], high[HALF_PER_LANE];
#pragma unroll
  for (int i = 0; i < HALF_PER_LANE; ++i) {
    low[i] = to_float(element(raw.low, i));
    high[i] = to_float(element(raw.high, i));
  }
  if (weight) {
    const int i0 = lane * HALF_PER_LANE;
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < HALF_PER_LANE; ++i) s = fmaf(high[i], high[i], fmaf(low[i], low[i], s));
#pragma unroll
    for (int m = 16; m > 0; m >>= 1) s += shuffle_xor(s, m);
    const float scale = rsqrtf(s / (float)HEAD_DIM + eps);
#pragma unroll
    for (int i = 0; i < HALF_PER_LANE; ++i) {
      low[i] = round_elem(to_float(weight[i0 + i]) * round_elem(low[i] * scale));
      high[i] = round_elem(to_float(weight[HEAD_DIM / 2 + i0 + i]) * round_elem(high[i] * scale));
    }
  }
  HeadRow made = {0, 0};
#pragma unroll
  for (int i = 0; i < HALF_PER_LANE; ++i) {
    const float c = turn.by[i].x, s = turn.by[i].y;
    made.low |= (Half)((Half)from_float(fmaf(low[i], c, -high[i] * s)) << (16 * i));
    made.high |= (Half)((Half)from_float(fmaf(high[i], c, low[i] * s)) << (16 * i));
  }
  return made;
}

// What the weights of a cut are relative to, by its highest score; -infinity: it is not seen.
// Never contracted with what follows, which the compiler might do in one kernel and not the other.
DEVICE float peak_of(float highest, float scale) { return __fmul_rn(highest, scale); }
DEVICE float base_of(float peak) { return peak == NEGATIVE_INFINITY ? 0.f : peak; }
DEVICE float weight_of(float score, float scale, float base) {
  return exp2_fast(fmaf(score, scale, -base));
}

// What the cuts so far and the next one count for, relative to the higher of their peaks.
struct Fold {
  float old, next;
};
DEVICE Fold fold(float& top, float peak) {
  const float higher = fmaxf(top, peak), base = base_of(higher);
  const Fold f = {exp2_fast(top - base), exp2_fast(peak - base)};
  top = higher;
  return f;
}
DEVICE float folded(float sum, float next, const Fold& f) { return fmaf(sum, f.old, f.next * next); }
