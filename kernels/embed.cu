// x[row] = table[tokens[row]]: the rows a step begins with. A token below 0 (the choice of a
// row that was not finite) is taken for 0: nobody will look at what comes of it.
//
// Lets the next kernel start only after its own wait, unlike all others: whatever starts
// later in the step then starts after the step before is complete, and may read its KV and
// state before waiting.
#include "prelude.cuh"

ENTRY void __launch_bounds__(128)
    embed(const int* tokens, const elem* __restrict__ table, elem* x, int hidden) {
  wait_for_previous();
  let_next_start();
  const uint4* from = (const uint4*)(table + (size_t)max(0, load_fresh(tokens + blockIdx.x)) * hidden);
  uint4* to = (uint4*)(x + (size_t)blockIdx.x * hidden);
  for (int i = threadIdx.x; i < hidden / 8; i += 128) to[i] = load_constant(from + i);
}
