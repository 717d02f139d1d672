from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.shared.config.schema import Config, DraftConfig, colors_wanted, environment_of, load
from outrider.shared.config.setting import Setting
from outrider.shared.core.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "outrider.toml"
    path.write_text(text)
    return path


def test_config_sources_rise_in_strength(tmp_path: Path) -> None:
    file = write(tmp_path, '[base]\ndevice = "cpu"\nmax_k = 3\nprefill_chunk = 7\n')
    env = {"OUTRIDER_BASE_MAX_K": "4", "OUTRIDER_BASE_PREFILL_CHUNK": "8", "HOME": "/"}
    flag = Setting("base", "prefill_chunk", "9", "flag --prefill-chunk", text=True)
    base = load(file, flags=[flag], environment=env).base
    assert (base.device, base.max_k, base.prefill_chunk, base.dtype) == ("cpu", 4, 9, "auto")


def test_config_names_a_file_by_environment(tmp_path: Path) -> None:
    file = write(tmp_path, "[draft]\nenabled = false\n")
    assert load(environment={"OUTRIDER_CONFIG": str(file)}).draft.enabled is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[base]\ndevice = "gpu"\n', ["base.device = 'gpu'", "cuda:N"]),
        ("[base]\nmax_k = 65\n", ["base.max_k = 65", ">= 0", "<= 64"]),
        ("[base]\nmax_k = true\n", ["base.max_k = True", "whole number"]),
        ('[base]\nmax_k = "3"\n', ["base.max_k = '3'", "whole number"]),
        ("[base]\narena_share = 0.0\n", ["base.arena_share = 0.0", "> 0.0"]),
        ("[base]\narena_share = nan\n", ["base.arena_share = nan"]),
        ("[draft]\nenabled = 1\n", ["draft.enabled = 1", "true or false"]),
        ('[base]\narena_bytes = "12 parsecs"\n', ["12 parsecs", "512MiB", "none"]),
        ('[base]\ndevise = "cpu"\n', ["unknown key base.devise", "did you mean 'device'"]),
        ('[bsae]\ndevice = "cpu"\n', ["unknown section [bsae]", "did you mean 'base'"]),
        ("[bsae]\n", ["unknown section [bsae]", "did you mean 'base'"]),
        ('device = "cpu"\n', ["device = 'cpu' stands outside a section"]),
        ("[base\n", ["not valid TOML"]),
    ],
)
def test_config_refuses_with_file_key_value_and_what_is_allowed(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), environment={})
    for word in ["outrider.toml", *words]:
        assert word in str(caught.value)


def test_config_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/no/such\.toml: can't be read"):
        load("/no/such.toml", environment={})


def test_config_environment_errors_name_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"OUTRIDER_BASE_DTYPE: base\.dtype = 'int3'"):
        load(environment={"OUTRIDER_BASE_DTYPE": "int3"})
    with pytest.raises(ConfigError, match="OUTRIDER_BASE_DTYP: unknown key"):
        load(environment={"OUTRIDER_BASE_DTYP": "bf16"})


def test_config_reads_aliases_units_and_none() -> None:
    env = {
        "OUTRIDER_BASE_DTYPE": "bf16",
        "OUTRIDER_BASE_ARENA_BYTES": "1.5GiB",
        "OUTRIDER_COORDINATOR_DRAFT_TARGET": "none",
        "OUTRIDER_DRAFT_ENABLED": "no",
    }
    config = load(environment=env)
    assert config.base.dtype == "bfloat16"
    assert config.base.arena_bytes == 3 * 2**29
    assert config.coordinator.draft_target is None
    assert config.draft.enabled is False


def test_config_is_checked_when_made_in_code() -> None:
    with pytest.raises(ConfigError, match="max_k = -1"):
        DraftConfig(max_k=-1)


def test_config_secrets_are_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        load(environment={"OUTRIDER_BASE_TOKEN": "sesame\0"})
    assert "sesame" not in str(caught.value)


@given(
    max_k=st.integers(0, 64),
    share=st.floats(0, 1, exclude_min=True),
    arena=st.none() | st.integers(1, 2**50),
    path=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
    enabled=st.booleans(),
)
def test_config_survives_the_way_to_a_child(
    max_k: int, share: float, arena: int | None, path: str, enabled: bool
) -> None:
    draft = DraftConfig(
        max_k=max_k, arena_share=share, arena_bytes=arena, path=path, enabled=enabled
    )
    config = dataclasses.replace(Config(), draft=draft)
    assert load(environment=environment_of(config)) == config


def test_config_colors_respect_no_color() -> None:
    assert colors_wanted(True, {})
    assert not colors_wanted(False, {})
    assert not colors_wanted(True, {"NO_COLOR": "1"})
    assert not colors_wanted(True, {"TERM": "dumb"})
