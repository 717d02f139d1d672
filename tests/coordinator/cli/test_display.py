"""What the command line shows, without a terminal."""

from __future__ import annotations

import io
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.coordinator.cli import display
from outrider.protos import generation_pb2 as pb

ACCEPTED, CORRECTED = pb.TOKEN_ORIGIN_ACCEPTED, pb.TOKEN_ORIGIN_CORRECTED


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_display_tokens_get_the_colour_of_their_origin() -> None:
    words = {1: "def", 2: " f", 3: "("}
    painter = display.Painter(lambda ids: words[ids[0]])
    delta = pb.Delta(text="def f(", token_ids=[1, 2, 3], origins=[ACCEPTED, ACCEPTED, CORRECTED])
    assert painter.paint(delta) == "\x1b[32mdef f\x1b[0m\x1b[31m(\x1b[0m"


@given(
    st.lists(st.tuples(st.text(max_size=4), st.sampled_from([0, 1, 2, 3, 4])), max_size=12),
    st.lists(st.integers(0, 12), max_size=4),
    st.integers(0, 3),
)
def test_display_colours_never_change_the_text(
    tokens: list[tuple[str, int]], cuts: list[int], held: int
) -> None:
    painter = display.Painter(lambda ids: tokens[ids[0]][0])
    text = "".join(piece for piece, _ in tokens)
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    sent, shown = 0, ""
    for start, end in itertools.pairwise(bounds):
        # Text may lag behind its tokens, as it does while it may still become a stop string.
        upto = max(sent, sum(len(piece) for piece, _ in tokens[:end]) - held)
        if end == len(tokens):
            upto = len(text)
        delta = pb.Delta(text=text[sent:upto], token_ids=range(start, end))
        delta.origins.extend(origin for _, origin in tokens[start:end])
        shown += painter.paint(delta)
        sent = upto
    assert plain(shown) == plain(text)


def test_display_progress_is_one_line_on_a_terminal_and_goes_away() -> None:
    stream = Terminal()
    progress = display.Progress(stream)
    progress("base", "loading")
    progress("draft", "loading")
    progress("base", "ready")
    progress("base", "ready")
    progress.clear()
    progress.clear()
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().split("\r\x1b[K")[1:] == [
        "base: loading",
        "base: loading   draft: loading",
        "base: ready   draft: loading",
        "",
    ]


def test_display_progress_is_plain_lines_elsewhere() -> None:
    stream = io.StringIO()
    progress = display.Progress(stream)
    progress("base", "loading")
    progress("base", "ready")
    progress.clear()
    assert stream.getvalue() == "base: loading\nbase: ready\n"


def finished() -> pb.Finished:
    made = pb.Finished(
        reason=pb.FINISH_REASON_STOP_STRING,
        stop_string="\n\n",
        usage=pb.Usage(prompt_tokens=3, completion_tokens=10),
        seed=7,
    )
    made.speculation.CopyFrom(
        pb.SpeculationStatistics(
            rounds=4,
            proposed=8,
            accepted=6,
            proposed_by_position=[4, 4],
            accepted_by_position=[4, 2],
            acceptance_rate=0.75,
            mean_accepted_length=2.5,
            seconds=pb.PhaseSeconds(draft=0.004, verify=0.04, overhead=0.002, total=0.05),
        )
    )
    return made


def test_display_json_names_the_reason_and_the_stop() -> None:
    made = display.as_json("x", [1, 2], finished())
    assert made["finish_reason"] == "stop_string"
    assert made["stop_string"] == "\n\n"
    assert "stop_token_id" not in made
    assert made["speculation"]["accepted_per_position"] == [4, 2]
    assert made["speculation"]["seconds"]["verify"] == pytest.approx(0.04)


def test_display_statistics_tell_the_drafts_share() -> None:
    text = display.statistics(finished(), [ACCEPTED] * 6 + [CORRECTED] * 4)
    assert "10 tokens in 0.05 s (200.0 tokens/s)" in text
    assert "the draft wrote 60% of the tokens: 6 of 8 proposed were accepted (75%)" in text
    assert "accepted by position: 100% 50%" in text
    assert "draft 1.00 ms, verify 10.00 ms, overhead 0.50 ms" in text


def test_display_statistics_tell_what_of_the_prompt_was_cached() -> None:
    made = finished()
    assert "cached" not in display.statistics(made, [])
    made.usage.prompt_tokens, made.usage.cached_prompt_tokens = 300, 256
    assert "256 of 300 tokens of the prompt were cached" in display.statistics(made, [])
    assert display.as_json("", [], made)["usage"]["cached_prompt_tokens"] == 256


def test_display_statistics_without_speculation() -> None:
    assert "the base wrote every token" in display.statistics(pb.Finished(), [])
