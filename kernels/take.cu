// The verifier's rows of a turn: each sequence's pending token and what the draft proposes
// after it. A sequence at its limit, and every one where the grant is over, brings no rows.
//
// Lets the next kernel start only after its own wait, as `embed` does, which comes next and
// waits too: so attention finds positions and row_counts complete before it has waited.
#include "prelude.cuh"

#define ENDED 0xffffffffu   // turns in a bell: the grant is over

ENTRY void __launch_bounds__(64)
    take(const long long* bell, const int* proposals, const int* committed, const int* pending,
         const int* limits, const int* ks, int* tokens, int* positions, int* noise_positions,
         int* row_counts, int* proposed, int columns, int width, int count) {
  wait_for_previous();
  let_next_start();
  const int s = threadIdx.x;
  if (s >= count) return;
  const int n = load_fresh(committed + s), left = load_fresh(limits + s) - n;
  const bool goes_on = left > 0 && (u32)load_fresh(bell) != ENDED;
  // `next_k` of shared/rounds/grants.py.
  int k = goes_on ? max(0, min(min(load_fresh(ks + s), width - 1), left - 1)) : 0;
  tokens[s * width] = goes_on ? load_fresh(pending + s) : 0;
  for (int j = 0; j < width - 1; ++j) {
    const int token = goes_on ? load_fresh(proposals + s * columns + j) : 0;
    if (token < 0) k = min(k, j);   // the draft's row was not finite
    tokens[s * width + 1 + j] = max(token, 0);
  }
  for (int j = 0; j < width; ++j) noise_positions[s * width + j] = goes_on ? n + j : 0;
  positions[s] = goes_on ? n - 1 : 0;
  row_counts[s] = goes_on ? k + 1 : 0;
  proposed[s] = k;
}
