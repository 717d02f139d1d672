// The draft's first rows of a turn: the two tokens that end each sequence's log, of which the
// draft may lack the KV of both. A sequence that does not go on brings no rows.
//
// Lets the next kernel start only after its own wait, as `embed` does, which comes next and
// waits too: so attention finds positions, row_counts and active complete before it has waited.
#include "prelude.cuh"

#define ENDED 0xffffffffu   // turns in a bell: the grant is over

ENTRY void __launch_bounds__(64)
    follow(const long long* bell, const int* slots, const int* chosen, int* pending, const int* ks,
           const int* limits, int* tokens, int* positions, int* noise_positions, int* row_counts,
           int* active, int* seen, int steps, int chosen_columns, int active_columns, int count) {
  wait_for_previous();
  let_next_start();
  const int s = threadIdx.x;
  if (s >= count) return;
  const int accepted = load_fresh(slots + 4 * s), token = load_fresh(slots + 4 * s + 1);
  const int n = load_fresh(slots + 4 * s + 2), flag = load_fresh(slots + 4 * s + 3);
  const int limit = load_fresh(limits + s);
  const bool ended = (u32)load_fresh(bell) == ENDED, goes_on = !ended && flag != 0 && limit > 0;
  seen[4 * s] = accepted;
  seen[4 * s + 1] = token;
  seen[4 * s + 2] = n;
  seen[4 * s + 3] = ended ? 0 : flag;

  int before = 0, k = 0;
  if (goes_on) {
    before = accepted > 0 ? load_fresh(chosen + (min(accepted, steps) - 1) * chosen_columns + s)
                          : load_fresh(pending + s);
    // `next_k` of shared/rounds/grants.py.
    k = max(0, min(min(load_fresh(ks + s), limit - n - 1), steps));
    pending[s] = token;
  }
  tokens[2 * s] = max(before, 0);
  tokens[2 * s + 1] = goes_on ? token : 0;
  positions[s] = goes_on ? n - 2 : 0;
  noise_positions[s] = goes_on ? n : 0;
  row_counts[s] = goes_on ? 2 : 0;
  for (int j = 0; j < steps; ++j) active[j * active_columns + s] = j < k;
}
