// Philox-4x32-10 (Salmon et al., 2011), counter-based: the noise of shared/sampling/noise.py.
#pragma once

DEVICE uint4 philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// A word as a number in (0, 1): min(word / 2^32 + 2^-33, 1 - 2^-24).
DEVICE float to_uniform(u32 word) {
  return fminf(fmaf((float)word, 0x1p-32f, 0x1p-33f), 1.f - 0x1p-24f);
}

// Gumbel noise of token ids 4 q .. 4 q + 3 at `position`: -log(-log1p(-u)) of their uniforms u.
DEVICE void gumbel4(float (&out)[4], u64 seed, u32 position, u32 q, u32 stream) {
  const uint4 r = philox(q, position, 0, stream, (u32)seed, (u32)(seed >> 32));
  const u32 w[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = -logf(-log1pf(-to_uniform(w[j])));
}
