"""The table of rules: what every row has elsewhere, and that a row and a file make a rule."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.coordinator.cli.generate_request import request_of
from outrider.coordinator.cli.main import make_parser
from outrider.coordinator.requests.validation import Limits, validate
from outrider.draft_service.engine import DraftEngine
from outrider.protos import generation_pb2 as public
from outrider.protos import speculation_pb2 as internal
from outrider.shared.core import wire
from outrider.shared.core.rules import AUTO, RULES, Rule
from outrider.shared.core.types import Decoding, OpenSequence
from outrider.shared.model.cuda.support import judged, simple
from outrider.verify_service import rules
from outrider.verify_service.acceptance import judge_named
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = (["generate", "x"], ["bench"])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rule_has_its_number_in_both_protos(rule: Rule) -> None:
    assert RULES[rule.word] is rule
    assert public.AcceptanceRule.Value(f"ACCEPTANCE_RULE_{rule.name}") == rule.number
    assert internal.Rule.Value(f"RULE_{rule.name}") == rule.number


@pytest.mark.parametrize("enum", [public.AcceptanceRule, internal.Rule])
def test_every_value_of_the_protos_but_unset_is_a_rule(enum: Any) -> None:
    assert sorted(enum.values()) == [0, *(rule.number for rule in RULES.values())]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_every_rule_can_be_asked_for_by_word(command: list[str]) -> None:
    parser = make_parser(command)
    for word in (AUTO, *RULES):
        assert parser.parse_args([*command, "--rule", word]).rule == word
    assert parser.parse_args(command).rule == AUTO


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rule_has_a_judge_in_a_file_of_that_name(rule: Rule) -> None:
    found: Any = judge_named(rule.judge)
    (folder,) = rules.__path__
    assert Path(found.__code__.co_filename) == Path(folder, f"{rule.judge}.py")


def test_every_rule_stands_in_the_docs() -> None:
    page = (DOCS / "acceptance.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| |"))
    assert re.findall(r"`(\w+)`", head) == list(RULES)
    parameters = (DOCS / "decoding.md").read_text()
    row = next(line for line in parameters.splitlines() if "`speculation.rule`" in line)
    for word in RULES:
        assert f"\n**`{word}`.**" in page, f"docs/acceptance.md does not explain {word}"
        assert f"`{word}`" in row, f"docs/decoding.md does not offer {word}"


# --- a fourth one ----------------------------------------------------------------------------

JUDGE = '''
"""At most one proposed token stands, and only if it is the base's own choice."""

from outrider.shared.sampling.choose import choose


def judge(batch, mine):
    targets = choose(batch.processed, batch.contexts)
    verdicts = []
    for i in mine:
        first, item = batch.first[i], batch.items[i]
        assert len(item.rows) == item.decoding.rule.needs_rows * len(item.proposal)
        stands = int(item.proposal[0] == targets[first])
        verdicts.append((stands, targets[first + stands]))
    return verdicts
'''


@pytest.fixture
def add_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``add_rule(row, text)``: a row in the table, and the file that it names."""
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    added = []

    def add(row: Rule, text: str) -> None:
        monkeypatch.setitem(RULES, row.word, row)
        (tmp_path / f"{row.judge}.py").write_text(text)
        added.append(f"{rules.__name__}.{row.judge}")

    yield add
    judge_named.cache_clear()
    for name in added:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("needs_rows", [False, True])
def test_a_row_and_a_file_make_a_rule(add_rule: Any, needs_rows: bool) -> None:
    number = 1 + max(rule.number for rule in RULES.values())
    add_rule(Rule("single", number, "single", needs_rows=needs_rows), JUDGE)
    words = ["generate", "5,6,7", "--token-ids", "--rule", "single", "--temperature", "0.9"]
    args = make_parser(words).parse_args([*words, "--seed", "3"])
    limits = Limits(
        vocab_size=engines.VOCAB, max_positions=64, max_k=8, slack=9, arena_longest=1000,
        eos_token_ids=(), default_k=None, default_max_new_tokens=16, max_new_tokens=48,
        max_logprobs=20,
    )  # fmt: skip
    asked = validate(request_of(args, args.prompt), limits, None)
    sent = wire.write_open(OpenSequence(1, 1, 64, asked.decoding))
    decoding = wire.read_open(sent).decoding
    assert decoding.rule is RULES["single"]
    # The device has no kernel for it: it is left to the host.
    assert not judged(decoding) and not simple(decoding)

    verify = VerifyEngine(engines.runner(engines.tiny_llama(1)), 8)
    draft = DraftEngine(engines.runner(engines.tiny_llama(1)), 8)
    prompt = [list(asked.prompt_ids)]
    (plain,) = engines.speculate(verify, None, prompt, 12, 0, Decoding(temperature=0.9, seed=3))
    (course,) = engines.speculate(verify, draft, prompt, 12, 4, decoding)
    assert course.written == plain.written
    # The draft is the base: with its noise it is always right, and one token stands a round.
    assert course.accepted <= 6 if needs_rows else course.accepted == 6
