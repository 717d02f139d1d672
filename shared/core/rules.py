"""The acceptance rules: a row each. Whoever lists, offers, checks or runs rules reads this table.

A new rule is a row here, its value in the enums of both protos, and, unless an existing judge
does, a file in ``verify_service/rules`` that judges by it. What the rules promise is in
docs/acceptance.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """One acceptance rule."""

    word: str
    """Its name in flags, figures and docs."""
    number: int
    """That of ``AcceptanceRule`` in generation.proto and of ``Rule`` in speculation.proto."""
    judge: str
    """The module of ``verify_service/rules`` that judges by it."""
    samples: bool = True
    """Whether it may be asked for at temperature > 0."""
    needs_rows: bool = False
    """Whether the draft draws from a distribution of its own, which goes with the proposal."""

    @property
    def name(self) -> str:
        """Its name in the protos, without the enum's prefix."""
        return self.word.upper()


RULES = {
    rule.word: rule
    for rule in (
        Rule("greedy", 1, "comparing", samples=False),
        Rule("coupled", 2, "comparing"),
        Rule("rejection", 3, "rejection", needs_rows=True),
    )
}
"""By word."""
GREEDY, COUPLED, REJECTION = RULES["greedy"], RULES["coupled"], RULES["rejection"]

AUTO = "auto"
"""The word that leaves the choice to the server, as the number 0 does in a request."""


def words() -> list[str]:
    """What can be asked for by word."""
    return [AUTO, *RULES]


def number_of(word: str) -> int:
    """The number that asks for what ``word``, one of ``words()``, asks for."""
    return 0 if word == AUTO else RULES[word].number


def numbered(number: int) -> Rule:
    """The rule of that number; raises ``ValueError`` saying which there are."""
    for rule in RULES.values():
        if rule.number == number:
            return rule
    raise ValueError("one of " + ", ".join(f"{r.number} ({r.name})" for r in RULES.values()))


def asked(number: int, temperature: float) -> Rule:
    """As ``numbered``; 0 is the server's choice."""
    if number:
        return numbered(number)
    return COUPLED if temperature > 0 else GREEDY
