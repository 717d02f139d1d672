"""Lengths as flags say them."""

from __future__ import annotations

import argparse
import random
import statistics

import pytest

from outrider.coordinator.bench.serve.lengths import read_lengths


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "1.5", "x", "uniform:", "uniform:5", "uniform:9-3", "uniform:0-3",
             "lognormal:64", "lognormal:0,1", "lognormal:64,-1", "lognormal:nan,1",
             "lognormal:inf,1", "lognormal:64,1,2", "normal:5,1"],
)  # fmt: skip
def test_lengths_refuse_what_is_none_and_say_what_is(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        read_lengths(text)
    assert repr(text) in str(caught.value) and "uniform:LOW-HIGH" in str(caught.value)


@pytest.mark.parametrize("text", ["64", "uniform:32-256", "lognormal:128,0.5"])
def test_lengths_as_text_are_the_flag(text: str) -> None:
    assert str(read_lengths(text)) == text


def test_uniform_lengths_are_all_from_low_to_high() -> None:
    source, lengths = random.Random(1), read_lengths("uniform:3-7")
    found = [lengths.draw(source) for _ in range(1000)]
    assert set(found) == {3, 4, 5, 6, 7}
    # Each has 200 of 1,000 with a deviation of 12.6.
    assert all(150 < found.count(one) < 250 for one in set(found))


def test_lognormal_lengths_have_the_mean_and_the_sigma_that_were_asked_for() -> None:
    from math import log

    source, lengths = random.Random(2), read_lengths("lognormal:500,0.5")
    found = [lengths.draw(source) for _ in range(20_000)]
    # The mean's own deviation is 500 * sqrt(exp(0.25) - 1) / sqrt(20,000) = 1.9.
    assert abs(statistics.fmean(found) - 500) < 8
    assert abs(statistics.stdev(log(one) for one in found) - 0.5) < 0.015


def test_lognormal_lengths_are_at_least_one() -> None:
    source, lengths = random.Random(3), read_lengths("lognormal:1,2")
    assert min(lengths.draw(source) for _ in range(500)) == 1


def test_fixed_lengths_draw_nothing() -> None:
    source = random.Random(4)
    before = source.getstate()
    assert read_lengths("64").draw(source) == 64 and source.getstate() == before
