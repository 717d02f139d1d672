"""One configuration value: how it is declared, read from text, and checked."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from outrider.shared.core.errors import ConfigError

DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A value as its source gave it; ``text`` when it is text to be parsed (environment, flags)."""

    section: str
    key: str
    value: Any
    source: str
    text: bool = False


def setting(default: Any = dataclasses.MISSING, *, help: str, **rules: Any) -> Any:
    """Declares a dataclass field with its help text and the rules of ``check``.

    Rules: ``choices``, ``aliases``, ``low``, ``high``, ``open_low``, ``size`` (bytes with a
    unit), ``check`` with ``allowed`` in words.
    """
    metadata = {"help": help, **rules}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def allowed(spec: dataclasses.Field[Any]) -> str:
    """What ``spec`` may be, in words."""
    rules: Mapping[str, Any] = spec.metadata
    kind, optional = _kind(spec)
    if "allowed" in rules:
        words = str(rules["allowed"])
    elif "choices" in rules:
        words = "one of " + ", ".join(rules["choices"])
    elif kind == "bool":
        words = "true or false"
    else:
        words = {"int": "a whole number", "float": "a number", "str": "text"}[kind]
        if rules.get("size"):
            words = "a number of bytes such as 512MiB"
        if "low" in rules:
            words += f" {'>' if rules.get('open_low') else '>='} {rules['low']}"
        if "high" in rules:
            words += f"{' and' if 'low' in rules else ''} <= {rules['high']}"
    return words + (", or none" if optional else "")


def coerce(spec: dataclasses.Field[Any], item: Setting) -> Any:
    """``item.value`` as the type of ``spec``; raises ``ConfigError`` naming source and key."""
    name = f"{item.section}.{item.key}"
    value = item.value
    kind, optional = _kind(spec)
    if isinstance(value, str):
        value = spec.metadata.get("aliases", {}).get(value.lower(), value)
        if optional and value.strip().lower() in ("none", ""):
            return None
        if item.text or (spec.metadata.get("size") and kind == "int"):
            value = _parse(value, kind, bool(spec.metadata.get("size")))
    if kind == "float" and type(value) is int:
        value = float(value)
    try:
        check(spec, value, name)
    except ConfigError:
        raise ConfigError(
            f"{item.source}: {name} = {_shown(name, item.value)}; must be {allowed(spec)}"
        ) from None
    return value


def check(spec: dataclasses.Field[Any], value: Any, name: str) -> None:
    """Raises ``ConfigError`` when ``value`` breaks the rules of ``spec``."""
    kind, optional = _kind(spec)
    if value is None and optional:
        return
    wanted: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool}
    rules: Mapping[str, Any] = spec.metadata
    good = isinstance(value, wanted[kind]) and (kind == "bool" or not isinstance(value, bool))
    if good and kind == "float":
        good = math.isfinite(value)
    if good and kind == "str":
        good = bool(value) and "\0" not in value
    if good and "choices" in rules:
        good = value in rules["choices"]
    if good and "low" in rules:
        good = value > rules["low"] if rules.get("open_low") else value >= rules["low"]
    if good and "high" in rules:
        good = value <= rules["high"]
    if good and "check" in rules:
        test: Callable[[Any], Any] = rules["check"]
        good = bool(test(value))
    if not good:
        raise ConfigError(f"{name} = {_shown(name, value)}; must be {allowed(spec)}")


@dataclass(frozen=True)
class Checked:
    """Values are checked on construction, wherever they come from."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            check(spec, getattr(self, spec.name), spec.name)


def _shown(name: str, value: Any) -> str:
    return "(hidden)" if name.endswith("token") else repr(value)


def _kind(spec: dataclasses.Field[Any]) -> tuple[str, bool]:
    # Annotations are text here (PEP 563), so no evaluation is needed.
    words = [word.strip() for word in str(spec.type).split("|")]
    return words[0], "None" in words


def _parse(text: str, kind: str, size: bool) -> Any:
    """``text`` as ``kind``, or unchanged where it is not one, for ``check`` to refuse."""
    if kind == "str":
        return text  # a path may well end in a space
    text = text.strip()
    if kind == "bool":
        return _WORDS.get(text.lower(), text)
    if kind == "int" and size:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.lower())
        return int(float(match[1]) * _UNITS[match[2] or ""]) if match else text
    try:
        return {"int": int, "float": float}[kind](text)
    except ValueError:
        return text
