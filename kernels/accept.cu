// Verdicts: how many proposed tokens equal the base's own choices, and the base's token
// after them. Greedy and coupled acceptance are the same comparison; what differs is how
// `chosen` was made. Row pending[s] chose the token that proposal 0 stands for.
#include "prelude.cuh"

ENTRY void __launch_bounds__(64)
    accept(const int* chosen, const int* tokens, const int* pending, const int* proposed,
           int* verdicts, int batch) {
  let_next_start();
  wait_for_previous();
  for (int s = threadIdx.x; s < batch; s += 64) {
    const int row = load_fresh(pending + s), k = load_fresh(proposed + s);
    int a = 0;
    while (a < k && load_fresh(chosen + row + a) == load_fresh(tokens + row + a + 1)) ++a;
    verdicts[2 * s] = a;
    verdicts[2 * s + 1] = load_fresh(chosen + row + a);
  }
}
