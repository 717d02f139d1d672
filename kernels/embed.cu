// x[row] = table[tokens[row]]: the rows a step begins with. A token that the table has not is
// taken for the nearest one that it has: one below 0 is the choice of a row that was not finite,
// one beyond its end comes from the other side of a link, whose vocabulary may be padded further.
// The hosts, which look at what came after the device is done, let nothing of it stand.
//
// Lets the next kernel start only after its own wait, unlike all others: whatever starts
// later in the step then starts after the step before is complete, and may read its KV and
// state before waiting.
#include "prelude.cuh"

ENTRY void __launch_bounds__(128)
    embed(const int* tokens, const elem* __restrict__ table, elem* x, int hidden,
          int vocabulary) {
  wait_for_previous();
  let_next_start();
  const int token = min(max(0, load_fresh(tokens + blockIdx.x)), vocabulary - 1);
  const uint4* from = (const uint4*)(table + (size_t)token * hidden);
  uint4* to = (uint4*)(x + (size_t)blockIdx.x * hidden);
  for (int i = threadIdx.x; i < hidden / 8; i += 128) to[i] = load_constant(from + i);
}
