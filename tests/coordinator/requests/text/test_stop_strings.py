"""Stop strings against a reference that looks at all of the text after every character."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from outrider.coordinator.requests.text.stop_strings import StopStrings
from outrider_testing.stops import Part, may_become_stop, naive, parts_of, sent

SPECIAL = ["<b>", "<", "b"]
STOPS = st.lists(
    st.lists(st.sampled_from("abc<>") | st.just("<b>"), min_size=1, max_size=4).map("".join),
    max_size=4,
)


class StopStringsMachine(RuleBasedStateMachine):
    """Feeds text in pieces; what is out must always be what the reference allows."""

    @initialize(stops=STOPS)
    def begin(self, stops: list[str]) -> None:
        self.stops = stops
        self.machine = StopStrings(stops)
        self.parts: list[Part] = []
        self.released = ""
        self.found: str | None = None

    @rule(piece=st.text("abc<>", max_size=6))
    def push(self, piece: str) -> None:
        if self.found is None:  # the end is the end
            self.take(parts_of(piece), *self.machine.push(piece))

    @rule(token=st.sampled_from(SPECIAL))
    def push_special(self, token: str) -> None:
        if self.found is None:
            coming = self.machine.completes([(token, True)], after_held=True)
            self.take([(token, True)], *self.machine.push_special(token))
            assert coming == (self.found is not None)

    def take(self, parts: list[Part], released: str, found: str | None) -> None:
        self.parts += parts
        self.released += released
        self.found = found

    @invariant()
    def agrees_with_reference(self) -> None:
        if not hasattr(self, "stops"):
            return
        text, stop = naive(self.parts, self.stops)
        assert self.found == stop
        if stop is not None:
            assert self.released == text
        else:
            held = may_become_stop(self.parts, self.stops)
            assert self.released == text[: len(text) - held]
            assert self.machine.held == text[len(text) - held :]
            assert sent(self.parts) == text


TestStopStringsMachine = StopStringsMachine.TestCase
TestStopStringsMachine.settings = settings(max_examples=150, stateful_step_count=15, deadline=None)


def test_stop_strings_flush_releases_what_was_held() -> None:
    machine = StopStrings(["abc", "a<c>"])
    assert machine.push("xab") == ("x", None)
    assert machine.push_special("<b>") == ("", None)
    assert machine.flush() == "ab"
    assert machine.flush() == ""


def test_stop_strings_mean_the_whole_of_a_special_token() -> None:
    machine = StopStrings(["b>", "x<b"])
    assert machine.push("x") == ("", None)
    assert machine.push_special("<b>") == ("", None)
    assert machine.push("b>") == ("x", "b>")


def test_stop_strings_find_in_the_text_to_send_what_special_tokens_part() -> None:
    machine = StopStrings(["ab", "a<b><b>"])
    assert machine.push("xa") == ("x", None)
    assert machine.push_special("<b>") == ("", None)
    assert machine.push("b") == ("", "ab")


def test_stop_strings_keep_no_more_than_the_longest() -> None:
    machine = StopStrings(["ab", "a<b>c"])
    machine.push("a")
    for _ in range(1000):
        machine.push_special("<b>")
    assert machine.held == "a"
    assert machine._written is not None
    assert len(machine._written._parts) < 5
    assert machine.push("b") == ("", "ab")
