"""Chat templates render as transformers renders them, and stay in their sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outrider.coordinator.requests.text.chat import ChatTemplate
from outrider.shared.core.errors import InvalidRequest

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße <b> \"x\" 'y'\n"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]

CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{% endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system_message = messages[0]['content'] | trim %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% set system_message = '' %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 %}{% set content = '<<SYS>>' + system_message + '<</SYS>>' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
FANCY = (
    "{%- set ns = namespace(count=0) -%}\n"
    "{%- for m in messages -%}\n"
    "  {%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}\n"
    "  {%- set ns.count = ns.count + 1 -%}\n"
    "  {{- ns.count }}:{{ m | tojson }};\n"
    "  {%- if m.role == 'assistant' -%}\n"
    "{% generation %}{{ m.content }}{% endgeneration %}{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{{ dict(a=1) | tojson(indent=2) }} {{ tools is none }}"
)


def folder_with(path: Path, template: str | None, *, file: bool = True) -> Path:
    """A tokenizer folder whose template is a file of its own, or within the configuration."""
    path.mkdir(exist_ok=True)
    config: dict[str, object] = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
    }
    if template is not None and file:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("template", [CHATML, LLAMA, FANCY], ids=["chatml", "llama", "fancy"])
@pytest.mark.parametrize("file", [True, False])
def test_chat_renders_as_transformers_does(tmp_path: Path, template: str, file: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    wanted, _ = render_jinja_template(
        [TALK],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    folder = folder_with(tmp_path / "model", template, file=file)
    assert ChatTemplate(folder).render(TALK) == wanted[0]


@pytest.mark.parametrize(
    ("inline", "files"),
    [
        ([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}], {}),
        ({"tool_use": "no", "default": "yes"}, {}),
        ([{"name": "tool_use", "template": "no"}], {}),
        ("no", {"chat_template.jinja": "yes", "additional_chat_templates/rag.jinja": "no"}),
        (
            "no",
            {"chat_template.jinja": "no", "additional_chat_templates/default.jinja": "yes"},
        ),
        ("no", {"additional_chat_templates/default.jinja": "yes"}),
        ("no", {"additional_chat_templates/rag.jinja": "no"}),
        ("yes", {}),
    ],
)
def test_chat_takes_the_default_of_several_templates_as_transformers_does(
    inline: object, files: dict[str, str], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": inline}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, template in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    try:
        wanted = theirs.apply_chat_template(TALK, tokenize=False)
    except ValueError:
        with pytest.raises(InvalidRequest, match="no chat template"):
            ChatTemplate(tmp_path).render(TALK)
    else:
        assert ChatTemplate(tmp_path).render(TALK) == wanted == "yes"


def test_chat_without_a_template_says_so(tmp_path: Path) -> None:
    for folder in (folder_with(tmp_path / "none", None), tmp_path / "missing"):
        with pytest.raises(InvalidRequest, match="no chat template"):
            ChatTemplate(folder).render(TALK)


def test_chat_template_that_refuses_says_why(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", LLAMA)
    with pytest.raises(InvalidRequest, match="roles must alternate") as error:
        ChatTemplate(folder).render(TALK[2:])
    assert error.value.field == "conversation.messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{% set ns = namespace(__init__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.fromkeys.__globals__ }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_chat_template_that_reaches_out_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(folder_with(tmp_path / "model", template)).render(TALK)


def test_chat_named_templates_use_the_default(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", None)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate(folder).render(TALK) == "yes"


def test_chat_template_with_wrong_syntax_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(folder_with(tmp_path / "model", "{% for %}")).render(TALK)
