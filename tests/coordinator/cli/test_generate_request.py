"""Flags of ``outrider generate`` become the fields of the request that they are named for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outrider.coordinator.cli.display import Sample
from outrider.coordinator.cli.generate_request import request_of
from outrider.coordinator.cli.main import make_parser
from outrider.protos import generation_pb2 as pb
from outrider.shared.core.errors import InvalidRequest


def asked(*words: str, prompt: str = "hi") -> pb.GenerateRequest:
    args = make_parser(["generate"]).parse_args(["generate", prompt, *words])
    return request_of(args, prompt)


SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.75,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "presence_penalty": -1.5,
    "frequency_penalty": 0.5,
    "min_new_tokens": 3,
    "seed": 2**64 - 1,
}


@pytest.mark.parametrize("name", SAMPLING)
def test_asking_sets_each_number_and_nothing_else(name: str) -> None:
    value = SAMPLING[name]
    made = asked(f"--{name.replace('_', '-')}={value}").sampling
    assert made == pb.SamplingParameters(**{name: value})


def test_asking_sets_nothing_that_was_not_said() -> None:
    made = asked()
    assert made.sampling == pb.SamplingParameters()
    assert not made.output.HasField("logprobs") and not made.output.HasField("num_samples")
    assert not made.stopping.HasField("max_new_tokens")
    assert not made.speculation.HasField("k")
    assert not made.resume_token_ids.ids


def test_asking_takes_lists_and_options() -> None:
    made = asked(
        *("--logit-bias=5=-2.5", "--logit-bias", "7=1", "--bad-words", "1,2", "--bad-words", "9"),
        *("--stop", "a", "--stop", "b", "--stop-token", "4", "--ignore-eos"),
        *("--logprobs", "3", "--n", "2", "--resume", "8,9", "--rule", "rejection", "--k", "2"),
    )
    assert dict(made.sampling.logit_bias) == {5: -2.5, 7: 1.0}
    assert [list(word.ids) for word in made.sampling.bad_words] == [[1, 2], [9]]
    assert (list(made.stopping.stop), list(made.stopping.stop_token_ids)) == (["a", "b"], [4])
    assert made.stopping.ignore_eos
    assert (made.output.logprobs, made.output.num_samples) == (3, 2)
    assert list(made.resume_token_ids.ids) == [8, 9]
    assert made.speculation == pb.SpeculationParameters(k=2, rule=pb.ACCEPTANCE_RULE_REJECTION)


def test_asking_takes_text_ids_and_conversations(tmp_path: Path) -> None:
    assert asked().prompt == "hi"
    assert list(asked("--token-ids", prompt="5,17,3").prompt_token_ids.ids) == [5, 17, 3]
    (one,) = asked("--chat").conversation.messages
    assert (one.role, one.content) == ("user", "hi")
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    made = asked("--messages", str(tmp_path / "talk.json")).conversation.messages
    assert [{"role": m.role, "content": m.content} for m in made] == talk


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"role": "user"}]', '["hi"]', "no json"])
def test_asking_says_what_a_conversation_must_be(tmp_path: Path, text: str) -> None:
    (tmp_path / "talk.json").write_text(text)
    with pytest.raises(InvalidRequest, match=r"^--messages: got .*must be a file with a JSON list"):
        asked("--messages", str(tmp_path / "talk.json"))
    with pytest.raises(InvalidRequest, match=r"^--messages"):
        asked("--messages", str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--logit-bias", "5"], "--logit-bias: got '5'; must be ID=BIAS"),
        (["--logit-bias", "x=1"], "--logit-bias: got 'x'; must be a whole number"),
        (["--bad-words", "1,x"], "--bad-words: got 'x'; must be a whole number"),
        (["--min-p", "1"], "--min-p: got '1'; must be a number >= 0 and < 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty: got '0'; must be a number >= 1e-06"),
        (["--presence-penalty", "3"], "--presence-penalty: got '3'; must be a number >= -2"),
        (["--frequency-penalty=-3"], "--frequency-penalty: got '-3'; must be a number >= -2"),
        (["--min-new-tokens", "-1"], "--min-new-tokens: got '-1'; must be a whole number"),
        (["--n", "0"], "--n: got '0'; must be a whole number >= 1"),
        (["--logprobs", "x"], "--logprobs: got 'x'; must be a whole number >= 0"),
        (["--resume", "1,,2"], "--resume: got ''; must be a whole number"),
    ],
)
def test_asking_refuses_bad_flags_by_name(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        asked(*words)
    assert stop.value.code == 2
    assert f"argument {told}" in capsys.readouterr().err


def test_a_sample_shows_its_logprobs_and_its_seed() -> None:
    sample = Sample()
    likely = pb.TokenLogprob(token_id=5, logprob=-0.5)
    entry = pb.TokenLogprobs(logprob=-0.5, top=[likely])
    sample.add(pb.Delta(text="a", token_ids=[5], logprobs=[entry]))
    sample.add(pb.Delta(text="b", token_ids=[6], logprobs=[entry]))
    sample.finished = pb.Finished(seed=9)
    assert sample.headed(1) == "== sample 1, seed 9 ==\nab"
    made = sample.as_json()
    assert (made["text"], made["token_ids"], made["seed"]) == ("ab", [5, 6], 9)
    top = [{"token_id": 5, "logprob": -0.5}]
    assert made["logprobs"] == [{"logprob": -0.5, "top": top}] * 2
