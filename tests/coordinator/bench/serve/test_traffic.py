"""The requests of a level: their arrivals, lengths and prompts follow from the seed."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from outrider.coordinator.bench.serve import traffic
from outrider.coordinator.bench.serve.lengths import read_lengths
from outrider.shared.core.errors import ConfigError, InvalidRequest

LENGTHS = read_lengths("uniform:2-40")


def drawn(count: int, seed: int = 0, level: int = 0) -> list[traffic.PlannedRequest]:
    return traffic.drawn_requests(count, LENGTHS, LENGTHS, seed=seed, level=level)


def test_arrivals_are_a_poisson_process() -> None:
    times = [0.0, *islice(traffic.arrivals(5.0, seed=3), 4000)]
    gaps = [b - a for a, b in pairwise(times)]
    # Gaps are exponential with the rate's mean, and a gap tells nothing of the next.
    assert stats.kstest(gaps, "expon", args=(0, 1 / 5.0)).pvalue > 0.01
    assert stats.pearsonr(gaps[:-1], gaps[1:]).pvalue > 0.01
    # Counts of whole seconds have the mean and the variance of their law, which are the same.
    counts = [sum(second <= t < second + 1 for t in times[1:]) for second in range(700)]
    dispersion = sum((n - 5.0) ** 2 / 5.0 for n in counts)
    assert 0.01 < stats.chi2.cdf(dispersion, len(counts)) < 0.99


def test_arrivals_at_another_rate_are_the_same_in_other_units() -> None:
    slow = list(islice(traffic.arrivals(1.0, seed=1), 50))
    fast = list(islice(traffic.arrivals(8.0, seed=1), 50))
    assert [8 * one for one in fast] == pytest.approx(slow)


def test_requests_follow_from_the_seed() -> None:
    assert drawn(30) == drawn(30)
    assert drawn(30) != drawn(30, seed=1)
    assert drawn(10) == drawn(30)[:10]
    assert list(islice(traffic.arrivals(2.0, 5), 9)) == list(islice(traffic.arrivals(2.0, 5), 9))
    assert list(islice(traffic.arrivals(2.0, 5), 9)) != list(islice(traffic.arrivals(2.0, 6), 9))


def test_levels_have_the_same_lengths_and_no_prompt_in_common() -> None:
    first, second = drawn(40), drawn(40, level=1)

    def sizes(requests: list[traffic.PlannedRequest]) -> list[tuple[int, int]]:
        return [(len(one.prompt), one.max_new_tokens) for one in requests]

    assert sizes(first) == sizes(second)
    long = {one.prompt for one in first if len(one.prompt) > 4}
    assert long and not long & {one.prompt for one in second}


def test_requests_without_lengths_of_prompts_are_heldout_code_in_turn() -> None:
    found = traffic.drawn_requests(300, None, LENGTHS, seed=0, level=0)
    texts = [one.prompt for one in found]
    assert all(isinstance(text, str) for text in texts)
    assert len(set(texts)) == 256 and texts[256:] == texts[:44]


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    return path


def test_file_is_read_by_arrival(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "def f():", "max_new_tokens": 5, "at": 2},
        "",
        {"prompt_tokens": 9, "max_new_tokens": 6, "at": 0.5},
    )
    later, first = traffic.read_requests(path, seed=0, level=0)[::-1]
    assert (later.prompt, later.max_new_tokens, later.at) == ("def f():", 5, 2)
    assert (len(first.prompt), first.max_new_tokens, first.at) == (9, 6, 0.5)
    (again, _) = traffic.read_requests(path, seed=0, level=1)
    assert again.prompt != first.prompt


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[]", "line 2: got '[]'; must be a JSON object"),
        ("{", "line 2: got '{'; must be a JSON object"),
        ({"max_new_tokens": 3}, "with one of prompt and prompt_tokens"),
        ({"prompt": "a", "prompt_tokens": 1, "max_new_tokens": 3}, "with one of prompt and"),
        ({"prompt": "", "max_new_tokens": 3}, "prompt: got ''; must be text of at least one"),
        ({"prompt": 7, "max_new_tokens": 3}, "prompt: got 7; must be text"),
        ({"prompt_tokens": 0, "max_new_tokens": 3}, "prompt_tokens: got 0; must be a whole"),
        ({"prompt": "a"}, "max_new_tokens: got None; must be a whole number >= 1"),
        ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens: got True; must be a whole"),
        ({"prompt": "a", "max_new_tokens": 3, "at": -1}, "at: got -1; must be seconds >= 0"),
        ({"prompt": "a", "max_new_tokens": 3, "at": True}, "at: got True; must be seconds >= 0"),
        ({"prompt": "a", "max_new_tokens": 3, "when": 1}, "got 'when'; must be of the fields"),
    ],
)
def test_file_with_a_wrong_line_is_refused_by_name(tmp_path: Path, line: Any, says: str) -> None:
    path = written(tmp_path, {"prompt": "a", "max_new_tokens": 3}, line)
    with pytest.raises(InvalidRequest) as caught:
        traffic.read_requests(path, seed=0, level=0)
    assert says in str(caught.value) and "line 2" in str(caught.value)


def test_file_says_for_all_requests_when_they_arrive_or_for_none(tmp_path: Path) -> None:
    one = {"prompt": "a", "max_new_tokens": 3}
    with pytest.raises(ConfigError, match=r"1 of the 2 lines .* must be all or none"):
        traffic.read_requests(written(tmp_path, one, one | {"at": 1}), seed=0, level=0)
    with pytest.raises(ConfigError, match="holds no request"):
        traffic.read_requests(written(tmp_path, ""), seed=0, level=0)
    with pytest.raises(ConfigError, match="can't be read"):
        traffic.read_requests(tmp_path / "gone.jsonl", seed=0, level=0)
