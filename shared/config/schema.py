"""Configuration: frozen dataclasses, one per role, and the only reader of TOML and environment.

Every value has one name, ``section.key``. Sources in rising order of strength::

    defaults < TOML file < OTEL_* variables < environment OUTRIDER_<SECTION>_<KEY> < flags

A value that can't work raises ``ConfigError`` naming its source, the key, the value and what
is allowed; an unknown key is refused together with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.shared.config import ngram, otel_environment
from outrider.shared.config.setting import DTYPE_ALIASES, Checked, Setting, coerce, setting
from outrider.shared.config.telemetry import TelemetryConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.core.links import AUTO, LINKS
from outrider.shared.core.rules import RULES

SECRETS = frozenset({"token", "services_token"})
_WITH_ROWS = ", ".join(rule.word for rule in RULES.values() if rule.needs_rows)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """One model in one process: what to load, where, and how much memory it may take."""

    path: str = setting(help="folder or hub id; 'base' and 'draft' are the bundled pair")
    device: str = setting(
        "auto",
        help="where the model runs",
        allowed="auto, cpu, mps, cuda or cuda:N",
        check=lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v),
    )
    dtype: str = setting(
        "auto",
        help="data type of weights and KV; auto is float32 on cpu, else the checkpoint's",
        choices=("auto", "float32", "float16", "bfloat16"),
        aliases=DTYPE_ALIASES,
    )
    arena_bytes: int | None = setting(
        None, help="bytes of the KV arena, such as 512MiB; none takes arena_share", low=1, size=True
    )
    arena_share: float = setting(
        0.6,
        help="share of free device memory for the arena; on cpu the default is 512 MiB",
        low=0.0,
        high=1.0,
        open_low=True,
    )
    max_k: int = setting(16, help="largest number of draft tokens in one proposal", low=0, high=64)
    prefill_chunk: int = setting(
        512,
        help="prompt rows of one pass where PyTorch forwards or layers have a sliding window; "
        "kernels have their own limits",
        low=1,
    )
    max_positions: int | None = setting(
        None, help="longest sequence in tokens; none takes the model's own context", low=2
    )
    max_sequences: int = setting(256, help="most live sequences", low=1)
    threads: int | None = setting(None, help="CPU threads of the model; none: shared out", low=1)
    runner: str = setting(
        "auto", help="implementation of the forward", choices=("auto", "generic", "llama", "cpu")
    )
    cache_dir: str | None = setting(
        None,
        help="folder for compiled kernels and what was tried out; none: the user's cache folder",
    )
    calibrate: bool = setting(
        True,
        help="time rounds when a model is first served here, two seconds at most, so that K is "
        "chosen by what they cost; kept in cache_dir",
    )
    link_spin_seconds: float | None = setting(
        None,
        help="how long to watch for the other service before sleeping; none: 0.02 where cores are "
        "left beside a forward, else 0",
        low=0.0,
        high=1.0,
    )
    process_seed: int | None = setting(
        None,
        help="seeds Python, NumPy and PyTorch in this process; none takes OUTRIDER_SEED",
        low=0,
        high=(1 << 64) - 1,
    )


@dataclass(frozen=True)
class ServeConfig(Checked):
    """How one gRPC server listens."""

    listen: str = setting("127.0.0.1:0", help="host:port or unix:/path; port 0 picks a free one")
    tls_certificate: str | None = setting(None, help="PEM file with the server's certificate chain")
    tls_key: str | None = setting(None, help="PEM file with the server's private key")
    tls_client_ca: str | None = setting(
        None, help="PEM file with the CAs of client certificates; set, clients must show one"
    )
    token: str | None = setting(None, help="bearer token that every call must carry")
    reflection: bool = setting(True, help="offer server reflection")
    drain_seconds: float = setting(
        10.0, help="after SIGTERM, how long running calls may go on", low=0.0
    )
    max_message_bytes: int = setting(
        64 << 20, help="largest message, such as 64MiB", low=1 << 16, high=(1 << 31) - 1, size=True
    )
    keepalive_seconds: float = setting(
        20.0, help="silence after which a peer is pinged; a peer that is gone is dropped", low=1.0
    )
    max_calls: int = setting(256, help="most calls at once", low=4)


@dataclass(frozen=True)
class DraftConfig(ModelConfig, ServeConfig):
    """The draft service, section ``[draft]``."""

    path: str = setting(
        "draft",
        help="folder or hub id; 'draft' is the bundled one, 'ngram' proposes from the text alone",
        allowed=f"a folder, a hub id, 'draft', or {ngram.ALLOWED}",
        check=lambda v: not ngram.is_ngram(v) or ngram.read_name(v) is not None,
    )
    # The draft's KV is a fraction of the base's, and both may share one device.
    arena_share: float = setting(
        0.2,
        help="share of free device memory for the arena; on cpu the default is 512 MiB",
        low=0.0,
        high=1.0,
        open_low=True,
    )
    listen: str = setting("127.0.0.1:50053", help="host:port or unix:/path")
    enabled: bool = setting(True, help="run a draft at all")


@dataclass(frozen=True)
class VerifyConfig(ModelConfig, ServeConfig):
    """The verify service, section ``[base]``."""

    path: str = setting(
        "base",
        help="folder or hub id; 'base' is the bundled one",
        allowed="a folder, a hub id or 'base': ngram is a draft",
        check=lambda v: not ngram.is_ngram(v),
    )
    listen: str = setting("127.0.0.1:50052", help="host:port or unix:/path")


@dataclass(frozen=True)
class CoordinatorConfig(ServeConfig):
    """The coordinator, section ``[coordinator]``."""

    listen: str = setting("127.0.0.1:50051", help="host:port or unix:/path")
    base_target: str = setting("127.0.0.1:50052", help="address of the verify service")
    draft_target: str | None = setting(
        "127.0.0.1:50053", help="address of the draft service; none runs the base alone"
    )
    tokenizer: str = setting("base", help="folder, hub id or tokenizer.json; the base's own")
    default_k: int | None = setting(
        None, help="draft tokens per proposal where a request does not say; none adapts", low=0
    )
    max_k: int = setting(16, help="largest K that a request may ask for", low=0, high=64)
    default_max_new_tokens: int = setting(256, help="new tokens where a request is silent", low=1)
    max_new_tokens_limit: int = setting(1 << 20, help="most new tokens of a request", low=1)
    max_running: int = setting(64, help="sequences that run at once", low=1)
    max_waiting: int = setting(1024, help="requests that may wait for admission", low=0)
    prefill_delay_seconds: float = setting(
        0.1,
        help="how much longer a round may take for the prompts in it, for the sake of sequences "
        "that decode; a few rows are taken in however long they take",
        low=0.0,
        high=60.0,
        open_low=True,
    )
    prefill_chunk: int = setting(
        8192, help="most prompt tokens of one round, whatever time there is", low=1
    )
    prefix_cache: int = setting(
        256,
        help="sequences that are over and stay cached at each service, in room that nobody else "
        "needs, for prompts that begin like them; 0: no prompt takes over what another has",
        low=0,
    )
    max_logprobs: int = setting(20, help="most log-probabilities per token", low=0, high=20)
    draft_top: int = setting(
        64,
        help=f"entries kept of the draft's distribution, for rule {_WITH_ROWS}",
        low=1,
        high=4096,
    )
    start_timeout_seconds: float = setting(
        120.0, help="how long to wait for the base at start", low=0.0
    )
    draft_start_seconds: float = setting(
        10.0, help="how long to wait for the draft at start, before going on without it", low=0.0
    )
    verify_timeout_seconds: float = setting(
        60.0, help="silence of the base in a round after which it counts as lost", low=0.1
    )
    draft_timeout_seconds: float = setting(
        20.0, help="silence of the draft after which it counts as lost", low=0.1
    )
    verify_patience_seconds: float = setting(
        30.0, help="how long requests wait for a base that is away", low=0.0
    )
    draft_patience_seconds: float = setting(
        1.0, help="how long a round waits for proposals before it goes on without", low=0.001
    )
    link: str = setting(
        AUTO,
        help="how proposals travel between draft and verifier; auto takes the best there is",
        choices=(AUTO, *LINKS),
    )
    grant_rounds: int = setting(
        64, help="rounds that the services run by themselves at a time; 0: none", low=0
    )
    services_token: str | None = setting(None, help="bearer token sent to the model services")
    services_ca: str | None = setting(
        None, help="PEM file with the CA of the model services; set, TLS is used"
    )
    services_certificate: str | None = setting(None, help="PEM file shown to the model services")
    services_key: str | None = setting(None, help="PEM file, key of services_certificate")


@dataclass(frozen=True)
class Config:
    """Everything, for a program that starts all parts."""

    base: VerifyConfig = dataclasses.field(default_factory=VerifyConfig)
    draft: DraftConfig = dataclasses.field(default_factory=DraftConfig)
    coordinator: CoordinatorConfig = dataclasses.field(default_factory=CoordinatorConfig)
    telemetry: TelemetryConfig = dataclasses.field(default_factory=TelemetryConfig)


SECTIONS: Mapping[str, type[Any]] = {
    "base": VerifyConfig,
    "draft": DraftConfig,
    "coordinator": CoordinatorConfig,
    "telemetry": TelemetryConfig,
}


def load(
    file: str | Path | None = None,
    *,
    flags: Iterable[Setting] = (),
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Reads all sources; ``environment`` defaults to the process's own.

    Without ``file``, ``OUTRIDER_CONFIG`` may name one. Raises ``ConfigError``.
    """
    env = os.environ if environment is None else environment
    file = file or env.get("OUTRIDER_CONFIG") or None
    settings: list[Setting] = []
    if file is not None:
        settings += _read_toml(Path(file))
    settings += otel_environment.settings(env)
    settings += _read_environment(env)
    settings += flags
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for item in settings:
        spec = _field(item)
        values[item.section][item.key] = coerce(spec, item)
    return Config(**{name: cls(**values[name]) for name, cls in SECTIONS.items()})


def environment_of(config: Config) -> dict[str, str]:
    """``config`` as environment variables, for a child process that resolves to the same values.

    Secrets go this way too, so that they never stand on a command line.
    """
    made = {}
    for section in SECTIONS:
        part = getattr(config, section)
        for spec in dataclasses.fields(part):
            value = getattr(part, spec.name)
            text = "none" if value is None else str(value)
            made[f"OUTRIDER_{section}_{spec.name}".upper()] = text
    return made


def _field(item: Setting) -> dataclasses.Field[Any]:
    if item.section not in SECTIONS:
        raise ConfigError(
            f"{item.source}: unknown section [{item.section}]; "
            + _nearest(item.section, SECTIONS, "sections")
        )
    known = {spec.name: spec for spec in dataclasses.fields(SECTIONS[item.section])}
    if item.key not in known:
        raise ConfigError(
            f"{item.source}: unknown key {item.section}.{item.key}; "
            + _nearest(item.key, known, f"keys of [{item.section}]")
        )
    return known[item.key]


def _nearest(word: str, known: Iterable[str], what: str) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"{what}: {', '.join(sorted(names))}"


def _read_toml(path: Path) -> Iterator[Setting]:
    try:
        with path.open("rb") as stream:
            tree = tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for section, table in tree.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"{path}: {section} = {table!r} stands outside a section; "
                f"sections: {', '.join(SECTIONS)}"
            )
        if not table:
            _field(Setting(section, next(iter(_keys(section)), ""), None, str(path)))
        for key, value in table.items():
            yield Setting(section, key, value, str(path))


def _keys(section: str) -> list[str]:
    cls = SECTIONS.get(section)
    return [spec.name for spec in dataclasses.fields(cls)] if cls else []


def _read_environment(env: Mapping[str, str]) -> Iterator[Setting]:
    for name in sorted(env):
        parts = name.lower().split("_", 2)
        if parts[0] == "outrider" and len(parts) == 3 and parts[1] in SECTIONS:
            source = f"environment variable {name}"
            yield Setting(parts[1], parts[2], env[name], source, text=True)


def colors_wanted(terminal: bool, environment: Mapping[str, str] | None = None) -> bool:
    """Whether to colour what goes to a terminal; see https://no-color.org."""
    env = os.environ if environment is None else environment
    return terminal and not env.get("NO_COLOR") and env.get("TERM") != "dumb"
