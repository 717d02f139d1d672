"""Philox against its published vectors and a plain-integer reference; the laws of the noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from outrider.shared.sampling import noise
from outrider.shared.sampling.philox import philox_numpy, philox_torch

# Random123's kat_vectors, "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def reference(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox-4x32-10 as the paper writes it, on Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def as_arrays(values):
    return [v.numpy().astype(np.uint64) if isinstance(v, torch.Tensor) else v for v in values]


def on(device):
    """Philox as it runs on ``device``: a function of int64 tensors to lists of integers."""
    if device == "numpy":
        return lambda counter, key: [
            w.astype(np.int64) for w in philox_numpy(as_arrays(counter), as_arrays(key))
        ]
    moved = lambda vs: [v.to(device) if isinstance(v, torch.Tensor) else v for v in vs]  # noqa: E731
    return lambda counter, key: [w.cpu() for w in philox_torch(moved(counter), moved(key))]


@pytest.mark.parametrize("device", ["numpy", *DEVICES])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected, device):
    assert reference(counter, key) == expected
    words = on(device)([torch.tensor([c]) for c in counter], key)
    assert tuple(int(w[0]) for w in words) == expected


@pytest.mark.parametrize("device", ["numpy", *DEVICES])
@pytest.mark.parametrize("columns", [7, 9001])
def test_philox_equals_the_plain_reference_with_broadcasting(device, columns):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(0, 2**32, shape, generator=generator)  # noqa: E731
    counter = (draw(1, columns), draw(5, 1), 3, draw(5, 1))
    key = (draw(5, 1), draw(5, 1))
    words = on(device)(counter, key)
    for i in range(5):
        for j in {*range(7), columns - 1}:
            expected = reference(
                (int(counter[0][0, j]), int(counter[1][i, 0]), 3, int(counter[3][i, 0])),
                (int(key[0][i, 0]), int(key[1][i, 0])),
            )
            assert tuple(int(w[i, j]) for w in words) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_gumbel_follows_the_documented_counter_and_mapping(device):
    seeds = (0, 7, 2**63 + 12345, 2**64 - 1)
    positions = (0, 1, 1000, 2**31 + 5)
    got = noise.gumbel(
        noise.seed_tensor(seeds, device), torch.tensor(positions, device=device), 11, stream=2
    ).cpu()
    assert got.dtype == torch.float32 and got.shape == (4, 11)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for token in range(11):
            word = reference((token >> 2, position, 0, 2), (seed % 2**32, seed >> 32))[token & 3]
            u = min((word + 0.5) / 2**32, 1 - 2.0**-24)
            # u itself is rounded to float32: a relative error of 2^-24 in u.
            assert float(got[row, token]) == pytest.approx(-math.log(-math.log1p(-u)), abs=3e-6)


def test_the_extreme_words_stay_inside_the_open_interval():
    words = torch.tensor([0, 1, 2**31, 2**32 - 129, 2**32 - 1]).to(torch.float32)
    u = noise._to_uniform(words.clone())
    assert float(u.min()) == 2.0**-33 and float(u.max()) == 1 - 2.0**-24
    g = noise._to_gumbel(words.clone())
    assert torch.isfinite(g).all()
    assert 22.87 < float(g.max()) < 22.89 and -2.82 < float(g.min()) < -2.81


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 65, 8192])
def test_gumbel_at_equals_gumbel_at_those_ids(vocab_size):
    seeds, positions = noise.seed_tensor([1, 2, 3]), torch.tensor([9, 8, 7])
    full = noise.gumbel(seeds, positions, vocab_size, stream=1)
    ids = torch.randint(0, vocab_size, (3, 50), generator=torch.Generator().manual_seed(1))
    some = noise.gumbel_at(seeds[:, None], positions[:, None], ids, stream=1)
    torch.testing.assert_close(some, full.gather(1, ids), rtol=0, atol=1e-6)


def test_noise_of_a_row_does_not_depend_on_the_batch_or_the_vocabulary():
    seeds, positions = noise.seed_tensor(range(6)), torch.arange(6) * 3
    full = noise.gumbel(seeds, positions, 100)
    for i in range(6):
        alone = noise.gumbel(seeds[i : i + 1], positions[i : i + 1], 100)
        assert torch.equal(alone[0], full[i])
    assert torch.equal(noise.gumbel(seeds, positions, 37), full[:, :37])


def test_stream_may_be_given_per_row():
    seeds, positions = noise.seed_tensor([5, 5]), torch.tensor([4, 4])
    both = noise.gumbel(seeds, positions, 10, stream=torch.tensor([0, 3]))
    assert torch.equal(both[0], noise.gumbel(seeds, positions, 10, stream=0)[0])
    assert torch.equal(both[1], noise.gumbel(seeds, positions, 10, stream=3)[1])


def test_seed_position_token_and_stream_each_change_the_noise():
    at = lambda seed, position, stream: noise.gumbel(  # noqa: E731
        noise.seed_tensor([seed]), torch.tensor([position]), 64, stream=stream
    )[0]
    base = at(1, 1, 0)
    for other in (at(2, 1, 0), at(1 + 2**32, 1, 0), at(1, 2, 0), at(1, 1, 1)):
        assert not torch.isclose(base, other).any()
    assert base.unique().numel() == 64


def test_gumbel_and_uniform_follow_their_laws():
    seeds, positions = noise.seed_tensor(range(100)), torch.arange(100)
    g = noise.gumbel(seeds, positions, 2000).flatten().double().numpy()
    assert stats.kstest(g, stats.gumbel_r.cdf).pvalue > 1e-3
    u = noise.uniform(seeds[:, None], torch.arange(2000)[None, :], stream=2)
    assert u.shape == (100, 2000) and float(u.min()) > 0 and float(u.max()) < 1
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > 1e-3


def test_neighbouring_counters_are_uncorrelated():
    g = noise.gumbel(noise.seed_tensor(range(400)), torch.arange(400), 256)
    g = (g - g.mean()) / g.std()
    for shifted in (g[:, 1:] * g[:, :-1], g[1:] * g[:-1]):
        assert abs(float(shifted.mean())) < 4 / shifted.numel() ** 0.5
