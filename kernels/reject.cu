// Verdicts by rejection sampling (Leviathan, Kalman, Matias 2023; Chen et al. 2023): a proposed
// token d ~ q stands iff u q(d) < p(d); the first that does not is replaced by a draw from the
// positive part of p - q, and a wholly accepted proposal is followed by a draw from p. A draw is
// the argmax of log weight + Gumbel noise.
//
// Every row is judged as if its turn came, in one launch that reads the logits once; what that
// computes for nothing, rows after the first rejection, runs beside the rest and costs less than
// a second launch that would wait to know the row. One pass does, although p needs the whole
// row's normaliser: where the draft offers nothing, log(p - q) is the logit less a constant, so
// the best of those tokens is found without it, and only the offered ones (at most ENTRIES)
// are left for when it is known.
//
// Grid: blocks that share a row x rows. The last block of a row to finish judges the row, the
// last row of all picks each sequence's first rejection. The blocks of a row are a function of
// the vocabulary alone: so is the order of the sums, and a verdict does not depend on its batch.
#include "prelude.cuh"
#include "noise.cuh"

#define THREADS 256
#define ENTRIES 64
#define MARKS 4096
#define POSITIVE_INFINITY (-NEGATIVE_INFINITY)
#define NOBODY 0x7fffffff
// Streams of the noise, see shared/sampling/noise.py.
#define CHOICE 0
#define ACCEPT 2
#define RESIDUAL 3

// Of some tokens of a row: the largest scaled logit (+inf: some are not finite), the sum of
// exp(logit - peak), and the best of those that the draft does not offer, with noise.
struct Part {
  float peak, sum, best;
  int id;
};

DEVICE void keep(float& best, int& id, float other, int other_id) {
  if (other > best || (other == best && other_id < id)) {
    best = other;
    id = other_id;
  }
}

DEVICE void merge(Part& a, const Part& b) {
  const float peak = fmaxf(a.peak, b.peak);
  // Equal ones are not subtracted: both may be infinite.
  a.sum = (a.peak == peak ? a.sum : a.sum * expf(a.peak - peak)) +
          (b.peak == peak ? b.sum : b.sum * expf(b.peak - peak));
  a.peak = peak;
  keep(a.best, a.id, b.best, b.id);
}

DEVICE void merge_warp(Part& a) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) {
    const Part other = {shuffle_xor(a.peak, m), shuffle_xor(a.sum, m), shuffle_xor(a.best, m),
                        shuffle_xor(a.id, m)};
    merge(a, other);
  }
}

DEVICE void keep_warp(float& best, int& id) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) {
    const float other = shuffle_xor(best, m);
    const int other_id = shuffle_xor(id, m);
    keep(best, id, other, other_id);
  }
}

DEVICE float sum_warp(float v) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) v += shuffle_xor(v, m);
  return v;
}

DEVICE float gumbel(u64 seed, u32 position, int id, u32 stream) {
  float noise[4];
  gumbel4(noise, seed, position, (u32)id >> 2, stream);
  return (id & 2) ? ((id & 1) ? noise[3] : noise[2]) : ((id & 1) ? noise[1] : noise[0]);
}

ENTRY void __launch_bounds__(THREADS)
    reject(const float* __restrict__ logits, const float* temperatures, const long long* seeds,
           const int* positions, const int* tokens, const int* counts, const int* ids,
           const float* offered, const int* pending, const int* proposed, int* parts,
           int* counters, int* outcomes, int* verdicts, int vocabulary, int sequences) {
  DYNAMIC_SHARED(memory);
  Part* own = (Part*)memory;                            // [warps]
  int* list = (int*)(own + THREADS / 32);               // [ENTRIES]
  int* flag = list + ENTRIES;                           // [4]
  unsigned char* marks = (unsigned char*)(flag + 4);    // [MARKS]
  const int tid = threadIdx.x, i = blockIdx.y, blocks = gridDim.x;
  let_next_start();
  wait_for_previous();
  const int count = load_fresh(counts + i);
  const float temperature = load_fresh(temperatures + i);
  const u64 seed = (u64)load_fresh(seeds + i);
  const u32 position = (u32)load_fresh(positions + i);
  const float* row = logits + (size_t)i * vocabulary;
  ids += i * ENTRIES;
  offered += i * ENTRIES;

  if (count < 0) {
    // A row that nobody asks about: one block counts it as done.
    if (blockIdx.x > 0) return;
  } else {
    // Which tokens are offered: a mark that others may share, then the list.
    ((uint4*)marks)[tid] = make_uint4(0, 0, 0, 0);
    BARRIER_BLOCK();
    if (tid < count) {
      list[tid] = load_fresh(ids + tid);
      marks[list[tid] & (MARKS - 1)] = 1;
    }
    BARRIER_BLOCK();
    const u32 stream = count > 0 ? RESIDUAL : CHOICE;
    Part part = {NEGATIVE_INFINITY, 0.f, NEGATIVE_INFINITY, NOBODY};
    bool finite = true;
    const int quads = (vocabulary + 3) / 4;
    for (int q = blockIdx.x * THREADS + tid; q < quads; q += blocks * THREADS) {
      float v[4], noise[4];
      if (vocabulary % 4 == 0) {
        const uint4 u = load_fresh((const uint4*)row + q);
        v[0] = __uint_as_float(u.x);
        v[1] = __uint_as_float(u.y);
        v[2] = __uint_as_float(u.z);
        v[3] = __uint_as_float(u.w);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          v[j] = q * 4 + j < vocabulary ? load_fresh(row + q * 4 + j) : NEGATIVE_INFINITY;
      }
      gumbel4(noise, seed, position, (u32)q, stream);
      const u32 marked = *(const u32*)(marks + (q * 4 & (MARKS - 1)));
      float peak = part.peak;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[j] = __fdiv_rn(v[j], temperature);
        finite = finite && v[j] < POSITIVE_INFINITY;  // NaN too
        peak = fmaxf(peak, v[j]);
        const float score = v[j] + noise[j];
        if (score > part.best) {
          bool free = true;
          if (marked >> (8 * j) & 0xff)
            for (int e = 0; e < count; ++e) free = free && list[e] != q * 4 + j;
          if (free) {
            part.best = score;
            part.id = q * 4 + j;
          }
        }
      }
      if (peak > NEGATIVE_INFINITY) {
        if (peak > part.peak) part.sum *= expf(part.peak - peak);
        part.peak = peak;
        part.sum += (expf(v[0] - peak) + expf(v[1] - peak)) +
                    (expf(v[2] - peak) + expf(v[3] - peak));
      }
    }
    if (!finite) {
      part.peak = POSITIVE_INFINITY;
      part.sum = 0.f;
    }
    merge_warp(part);
    if (tid % 32 == 0) own[tid / 32] = part;
    BARRIER_BLOCK();
    if (tid == 0) {
      for (int w = 1; w < THREADS / 32; ++w) merge(part, own[w]);
      ((uint4*)parts)[i * blocks + blockIdx.x] =
          make_uint4(__float_as_uint(part.peak), __float_as_uint(part.sum),
                     __float_as_uint(part.best), (u32)part.id);
      __threadfence();
      const int arrived = atomicAdd(counters + 1 + i, 1);
      *flag = arrived == blocks - 1;
      if (arrived == blocks - 1) counters[1 + i] = 0;
    }
    BARRIER_BLOCK();
    if (!*flag) return;
  }
  if (tid >= 32) return;
  __threadfence();

  // The row, by one warp.
  bool stands = false;
  int token = -1;
  if (count >= 0) {
    Part part = {NEGATIVE_INFINITY, 0.f, NEGATIVE_INFINITY, NOBODY};
    if (tid < blocks) {
      const uint4 u = load_fresh((const uint4*)parts + i * blocks + tid);
      part = {__uint_as_float(u.x), __uint_as_float(u.y), __uint_as_float(u.z), (int)u.w};
    }
    merge_warp(part);
    const bool finite = part.peak > NEGATIVE_INFINITY && part.peak < POSITIVE_INFINITY;
    token = part.id;
    if (finite && count > 0) {
      const float normaliser = part.peak + logf(part.sum);
      float mass = 0.f;
      for (int e = tid; e < count; e += 32) mass += load_fresh(offered + e);
      mass = fmaxf(sum_warp(mass), 1e-30f);
      const int proposal = load_fresh(tokens + i + 1);
      // Offered tokens by the positive part of p - q, and by p, should all of that be empty:
      // p is q but for rounding then.
      float q_at = 0.f, rest = NEGATIVE_INFINITY, whole = NEGATIVE_INFINITY;
      int rest_id = NOBODY, whole_id = NOBODY;
      for (int e = tid; e < count; e += 32) {
        const int id = load_fresh(ids + e);
        const float q = __fdiv_rn(load_fresh(offered + e), mass);
        const float log_p = __fdiv_rn(load_fresh(row + id), temperature) - normaliser;
        const float p = expf(log_p), noise = gumbel(seed, position, id, RESIDUAL);
        if (id == proposal) q_at += q;
        if (p > q) keep(rest, rest_id, logf(p - q) + noise, id);
        if (p > 0.f) keep(whole, whole_id, log_p + noise, id);
      }
      q_at = sum_warp(q_at);
      keep_warp(rest, rest_id);
      keep_warp(whole, whole_id);
      if (part.id != NOBODY) {
        const float score = part.best - normaliser;
        keep(whole, whole_id, score, part.id);
        // A weight that is 0 in float32 is none.
        const float log_p = __fdiv_rn(load_fresh(row + part.id), temperature) - normaliser;
        if (expf(log_p) > 0.f) keep(rest, rest_id, score, part.id);
      }
      token = rest_id != NOBODY ? rest_id : whole_id;
      const float u = to_uniform(philox(0, position, 0, ACCEPT, (u32)seed, (u32)(seed >> 32)).x);
      const float p_at = expf(__fdiv_rn(load_fresh(row + proposal), temperature) - normaliser);
      stands = u * q_at < p_at;
    }
    if (!finite) token = -1;
  }
  int last = 0;
  if (tid == 0) {
    outcomes[2 * i] = stands;
    outcomes[2 * i + 1] = token;
    __threadfence();
    last = atomicAdd(counters, 1) == (int)gridDim.y - 1;
    if (last) counters[0] = 0;
  }
  if (!shuffle(last, 0)) return;

  __threadfence();
  BARRIER_WARP();
  for (int s = tid; s < sequences; s += 32) {
    const int first = load_fresh(pending + s), k = load_fresh(proposed + s);
    if (k < 0) continue;
    int a = 0;
    while (a < k && load_fresh(outcomes + 2 * (first + a))) ++a;
    verdicts[2 * s] = a;
    verdicts[2 * s + 1] = load_fresh(outcomes + 2 * (first + a) + 1);
  }
}
