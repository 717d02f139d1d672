"""Conversations to text through the model's own chat template.

The template language and its environment are those of transformers' ``apply_chat_template``
(Jinja2, sandboxed, the same helpers and the same hardening, since templates come with models),
rendered with Jinja2 alone so that a first conversation does not import transformers into a
process that is streaming.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from outrider.shared.core.errors import InvalidRequest
from outrider.shared.core.tokenizer_files import read_json, special_tokens

FIELD = "conversation"


class ChatTemplate:
    """The chat template of the tokenizer in one folder; read when first used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for ``messages``, ending where the assistant is to speak.

        Raises ``InvalidRequest`` where the model has no template or the template refuses.
        """
        if self._source is None:
            raise InvalidRequest(
                FIELD,
                "a conversation",
                "a prompt instead: this model's tokenizer has no chat template",
            )
        try:
            return str(
                self._template.render(
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                    **self._special_tokens,
                )
            )
        except Exception as error:  # the template is a program that came with the model
            roles = [message["role"] for message in messages]
            raise InvalidRequest(
                FIELD + ".messages", roles, f"what the chat template takes: {error}"
            ) from None

    @cached_property
    def _configuration(self) -> dict[str, Any]:
        return read_json(self._folder / "tokenizer_config.json")

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        return special_tokens(self._folder)

    @cached_property
    def _source(self) -> str | None:
        more = self._folder / "additional_chat_templates"
        files = [self._folder / "chat_template.jinja", *more.glob("*.jinja")]
        if any(file.is_file() for file in files):  # then the configuration's do not count
            for path in (more / "default.jinja", files[0]):
                if path.is_file():
                    return path.read_text(encoding="utf-8")
            return None
        inline = self._configuration.get("chat_template")
        if isinstance(inline, list):  # several named templates
            inline = {entry["name"]: entry["template"] for entry in inline}
        if isinstance(inline, dict):
            inline = inline.get("default")
        return inline if isinstance(inline, str) else None

    @cached_property
    def _template(self) -> Any:
        return _compile(self._source or "")


def _compile(source: str) -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant said; for a prompt it changes nothing."""

        tags = {"generation"}  # noqa: RUF012  (Jinja2's own protocol)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class SafeDict:
        """``dict`` for templates, without the attributes of the type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

    class SafeNamespace(Namespace):
        """``namespace`` for templates, without access to Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a lawful key
            self, rest = args[0], args[1:]
            values = dict(*rest, **kwargs)
            for name in values:
                SafeNamespace._checked(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            SafeNamespace._checked(name)
            super().__setitem__(name, value)

        @staticmethod
        def _checked(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a template may not set {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = SafeDict()
    environment.globals["namespace"] = SafeNamespace
    return environment.from_string(source)
