// From verdicts to where the sequences stand: committed length and pending token, and the slots
// from which the draft goes on. Only kernels that wait first read what is written here.
#include "prelude.cuh"

ENTRY void __launch_bounds__(64)
    settle(const int* verdicts, int* committed, int* pending, const int* row_counts,
           const int* limits, int* slots, int count) {
  let_next_start();
  wait_for_previous();
  const int s = threadIdx.x;
  if (s >= count) return;
  int n = load_fresh(committed + s), accepted = 0, token = 0, goes_on = 0;
  if (load_fresh(row_counts + s) > 0) {
    accepted = load_fresh(verdicts + 2 * s);
    token = load_fresh(verdicts + 2 * s + 1);
    if (token >= 0) {   // else the base's row was not finite
      n += accepted + 1;
      committed[s] = n;
      pending[s] = token;
      goes_on = n < load_fresh(limits + s);
    }
  }
  slots[4 * s] = accepted;
  slots[4 * s + 1] = token;
  slots[4 * s + 2] = n;
  slots[4 * s + 3] = goes_on;
}
