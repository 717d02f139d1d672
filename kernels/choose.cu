// tokens[i] = argmax over v of logits[row_i, v] (lowest id on ties), or with a temperature
// argmax(logits / temperature + gumbel(seed, position, v)): one token a row, nothing else
// leaves the device. Grid: blocks that share a row x rows; the last block of a row to
// finish compares the blocks' winners. Comparing is exact, so its order is free.
#include "prelude.cuh"
#include "noise.cuh"

#define THREADS 256
#define POSITIVE_INFINITY (-NEGATIVE_INFINITY)

DEVICE void keep(float& best, int& id, float other, int other_id) {
  if (other > best || (other == best && other_id < id)) {
    best = other;
    id = other_id;
  }
}

ENTRY void __launch_bounds__(THREADS)
    choose(const float* __restrict__ logits, const int* rows, const float* temperatures,
           const long long* seeds, const int* positions, int position_offset, float* winners,
           int* winner_ids, int* counters, int* tokens, int vocabulary) {
  DYNAMIC_SHARED(memory);
  float* values = (float*)memory;
  int* ids = (int*)(values + THREADS / 32);
  int* flag = ids + THREADS / 32;
  const int tid = threadIdx.x, i = blockIdx.y, blocks = gridDim.x;
  let_next_start();
  wait_for_previous();
  const float temperature = load_fresh(temperatures + i);
  const u64 seed = (u64)load_fresh(seeds + i);
  const u32 position = (u32)(load_fresh(positions + i) + position_offset);
  const float* row = logits + (size_t)(rows ? load_fresh(rows + i) : i) * vocabulary;

  float best = NEGATIVE_INFINITY;
  int id = 0x7fffffff;
  const int quads = (vocabulary + 3) / 4;
#pragma unroll 4
  for (int q = blockIdx.x * THREADS + tid; q < quads; q += blocks * THREADS) {
    float v[4];
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
    if (temperature > 0.f) {
      float noise[4];
      gumbel4(noise, seed, position, (u32)q, 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = __fdiv_rn(v[j], temperature) + noise[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      keep(best, id, v[j], q * 4 + j);
      if (!(v[j] < POSITIVE_INFINITY)) {   // NaN too
        best = POSITIVE_INFINITY;
        id = -1;
      }
    }
  }
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) {
    const float other = shuffle_xor(best, m);
    const int other_id = shuffle_xor(id, m);
    keep(best, id, other, other_id);
  }
  if (tid % 32 == 0) {
    values[tid / 32] = best;
    ids[tid / 32] = id;
  }
  BARRIER_BLOCK();
  if (tid == 0) {
    for (int w = 1; w < THREADS / 32; ++w) keep(best, id, values[w], ids[w]);
    winners[i * blocks + blockIdx.x] = best;
    winner_ids[i * blocks + blockIdx.x] = id;
    __threadfence();
    const int arrived = atomicAdd(counters + i, 1);
    *flag = arrived == blocks - 1;
    if (arrived == blocks - 1) counters[i] = 0;
  }
  BARRIER_BLOCK();
  if (*flag && tid < 32) {
    __threadfence();
    best = NEGATIVE_INFINITY;
    id = 0x7fffffff;
    for (int b = tid; b < blocks; b += 32)
      keep(best, id, load_fresh(winners + i * blocks + b), load_fresh(winner_ids + i * blocks + b));
#pragma unroll
    for (int m = 16; m > 0; m >>= 1) {
      const float other = shuffle_xor(best, m);
      const int other_id = shuffle_xor(id, m);
      keep(best, id, other, other_id);
    }
    if (tid == 0) tokens[i] = best > NEGATIVE_INFINITY ? id : -1;
  }
}
