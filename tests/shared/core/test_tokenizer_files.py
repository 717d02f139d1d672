"""Added and special tokens beside the vocabulary, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models

from outrider.coordinator.requests.text.tokenizer import load_tokenizer
from outrider.shared.core.tokenizer_files import CLASSES, DEFAULTS, special_tokens
from outrider.shared.model.hf.generation_defaults import left_to_requests
from outrider.shared.model.vocabulary import fingerprint
from outrider_testing.architectures import ARCHITECTURES
from outrider_testing.tokenizer_families import FAMILIES

TEMPLATE = (
    "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ messages[0].content }}"
)
TALK = [{"role": "user", "content": "hi"}]
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


def write(folder: Path, config: dict[str, Any], special: dict[str, Any] | None = None) -> Path:
    vocabulary = {"<s>": 0, "hi": 1, "<a>": 2, "<b>": 3}
    Tokenizer(models.WordLevel(vocabulary, unk_token="hi")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    if special is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


@pytest.mark.parametrize(
    ("config", "special"),
    [
        (PLAIN, {"bos_token": "<s>"}),
        (PLAIN, {"bos_token": {"content": "<a>", "lstrip": False}, "eos_token": "<b>"}),
        (PLAIN | {"bos_token": "<a>"}, {"bos_token": "<b>"}),
        (PLAIN | {"bos_token": None}, {"bos_token": "<b>"}),
        (
            PLAIN
            | {
                "bos_token": "<a>",
                "added_tokens_decoder": {"2": {"content": "<a>", "special": True}},
            },
            {"bos_token": "<b>", "eos_token": "<s>"},
        ),
        ({"tokenizer_class": "LlamaTokenizerFast"}, None),
        ({"tokenizer_class": "LlamaTokenizer", "eos_token": "<b>"}, None),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {"eos_token": "<a>"}),
        (PLAIN, None),
    ],
)
def test_chat_template_gets_the_special_tokens_of_transformers(
    config: dict[str, Any], special: dict[str, Any] | None, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = write(tmp_path, config, special)
    wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK, tokenize=False)
    assert load_tokenizer(str(folder)).chat.render(TALK) == wanted


@pytest.mark.parametrize("kind", DEFAULTS)
def test_special_tokens_of_a_class_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(write(tmp_path, {"tokenizer_class": kind}))
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    own = {name: getattr(theirs, name) for name in names}
    assert special_tokens(tmp_path) == {name: text for name, text in own.items() if text}


def test_class_of_files_that_name_none_is_that_of_the_model_type(tmp_path: Path) -> None:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    named = {kind: name for kind, name in TOKENIZER_MAPPING_NAMES.items() if name in DEFAULTS}
    served = {kind for kind, _ in ARCHITECTURES.values()}
    assert {k: v for k, v in named.items() if k in served | CLASSES.keys()} == CLASSES


@pytest.mark.parametrize("model", [{"model_type": "gpt_neox"}, {"model_type": "bloom"}, {}])
@pytest.mark.parametrize("config", [{}, PLAIN, {"tokenizer_class": "GPT2Tokenizer"}])
def test_special_tokens_are_those_of_the_class_that_transformers_chooses(
    model: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    write(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(model))
    wanted = AutoTokenizer.from_pretrained(tmp_path).special_tokens_map if model or config else {}
    assert special_tokens(tmp_path) == wanted


FLAGS = [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}]
TEXTS = ["a <|tool|> b", "a<|tool|>b", "a  <|tool|>  b <s> c", "<NEW> d", "d <new> e", "d<new>e"]


def with_flags(folder: Path, where: str, flags: dict[str, bool]) -> Path:
    """A byte-level tokenizer whose tokens are found so; ``where`` says which file has it."""
    made = FAMILIES["byte-level"]()
    size = made.get_vocab_size()
    tool: dict[str, Any] = {"content": "<|tool|>", "special": True} | flags
    config: dict[str, Any] = dict(PLAIN)
    if where == "decoder":
        new = {"content": "<new>", "special": False} | flags
        config["added_tokens_decoder"] = {str(made.token_to_id("<|tool|>")): tool, str(size): new}
    if where == "name":
        config["eos_token"] = {"__type": "AddedToken", **tool}
    written = json.loads(made.to_str())
    for one in written["added_tokens"]:
        one.update(flags if where == "tokenizer.json" else {})
    if where == "name":  # the token stands in the vocabulary alone
        written["added_tokens"] = []
    if where == "tokenizer.json":
        config["eos_token"] = "<|tool|>"
    (folder / "tokenizer.json").write_text(json.dumps(written))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("where", ["decoder", "name", "tokenizer.json"])
@pytest.mark.parametrize("flags", [*FLAGS, {"special": False}], ids=str)
def test_added_tokens_are_found_as_their_flags_say(
    where: str, flags: dict[str, bool], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = with_flags(tmp_path, where, flags)
    theirs = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    ours = load_tokenizer(str(folder))._backend
    for text in TEXTS:
        wanted = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False).tokens == wanted.tokens
        assert ours.decode(wanted.ids) == theirs.decode(wanted.ids)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_stand_beside_the_vocabulary_count(where: str, tmp_path: Path) -> None:
    listed = {"4": {"content": "<|im_end|>", "special": True}, "5": {"content": "<think>"}}
    write(tmp_path, PLAIN | ({"added_tokens_decoder": listed} if "config" in where else {}))
    if "config" not in where:
        (tmp_path / where).write_text(json.dumps({"<|im_end|>": 4, "<think>": 5}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("hi<|im_end|>hi<think>") == [1, 4, 1, 5]
    if "config" in where:
        assert tokenizer.special_tokens()[4] == "<|im_end|>"
        assert tokenizer.decode([1, 4, 5]) == "hi <think>"


def test_special_tokens_by_name_are_left_out_of_the_text(tmp_path: Path) -> None:
    folder = write(tmp_path, PLAIN, {"eos_token": "<b>"})
    assert load_tokenizer(str(folder)).decode([1, 3, 1]) == "hi hi"


def byte_pairs(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    written = {"tokenizer_class": "Qwen2Tokenizer"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return folder


def test_fingerprint_is_the_same_for_all_forms_of_a_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    added = {"3": {"content": "<|im_end|>", "special": True}}
    pairs = byte_pairs(tmp_path / "pairs", added_tokens_decoder=added)
    AutoTokenizer.from_pretrained(pairs).save_pretrained(tmp_path / "one")
    listed = byte_pairs(tmp_path / "listed")
    (listed / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 3}))
    apart = tmp_path / "apart"
    apart.mkdir()
    Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(
        str(apart / "tokenizer.json")
    )
    (apart / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 3}))
    forms = [pairs, tmp_path / "one", listed, apart]
    assert len({fingerprint(str(folder), 4) for folder in forms}) == 1
    other = byte_pairs(tmp_path / "other", added_tokens_decoder={"3": {"content": "<|end|>"}})
    assert fingerprint(str(other), 4) != fingerprint(str(pairs), 4)


def test_fingerprint_leaves_out_ids_that_the_model_has_not(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    (tmp_path / "one").mkdir()
    backend.save(str(tmp_path / "one" / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<x>", special=True)])
    (tmp_path / "two").mkdir()
    backend.save(str(tmp_path / "two" / "tokenizer.json"))
    assert fingerprint(str(tmp_path / "one"), 2) == fingerprint(str(tmp_path / "two"), 2)
    assert fingerprint(str(tmp_path / "one"), 3) != fingerprint(str(tmp_path / "two"), 3)


def test_generation_defaults_that_are_not_applied_are_named(tmp_path: Path) -> None:
    assert left_to_requests(tmp_path) == []
    written = {"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20, "do_sample": True}
    written |= {"max_length": 4096}
    written |= {"no_repeat_ngram_size": 3, "repetition_penalty": 1.0, "suppress_tokens": [4]}
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    assert left_to_requests(tmp_path) == [
        "do_sample = True",
        "temperature = 0.6",
        "top_k = 20",
        "no_repeat_ngram_size = 3",
        "suppress_tokens = [4]",
        "max_length = 4096",
    ]
    (tmp_path / "generation_config.json").write_text('{"max_length": 20}')
    assert left_to_requests(tmp_path) == []
