"""From a folder or hub id to a ``Runner``: device, data type, arena, and which path forwards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.core.host import threads_allowed
from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.kv.storage import LayerKind, Storage, shared_pools
from outrider.shared.model.hf.context import context_of
from outrider.shared.model.hf.loading import choose_dtype, load_model
from outrider.shared.model.hf.weight_files import check_weight_files
from outrider.shared.model.llama.checkpoint import LlamaForCausalLM, load_plain
from outrider.shared.model.llama.runner import LlamaRunner, why_not
from outrider.shared.model.locate import model_path
from outrider.shared.model.paced.loading import load_paced
from outrider.shared.model.paced.spec import parse
from outrider.shared.model.runner import Runner
from outrider.shared.model.vocabulary import fingerprint

log = logging.getLogger(__name__)

CPU_ARENA_BYTES = 512 << 20
# Below this a step is so short that handing work to a second thread costs more than it saves,
# since draft, base and coordinator share the cores: on 2 cores the bundled base decodes 99
# tokens/s with one thread and 75 with two (`outrider bench`, K = 0).
_ONE_THREAD = 64 << 20


def load_runner(
    config: ModelConfig, progress: Callable[[str], None] = lambda message: None
) -> Runner:
    """Loads a model and allocates its arena.

    ``progress`` is told, in a few words, what is being done. Raises ``ConfigError``: no model
    there or not a whole one, one that can't work, a device that is missing, an arena that is too
    small.
    """
    spec = parse(config.path)
    if spec is not None:
        return load_paced(spec, config, _budget(config, torch.device("cpu")))
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path = model_path(config.path)
    progress(f"loading {path}")
    if Path(path).is_dir():
        check_weight_files(Path(path))
    model: Any = None
    if config.runner != "generic":
        model = load_plain(path, lambda own: choose_dtype(config.dtype, own, device), device)
    if model is None:
        model = load_model(path, config.dtype, device)
    try:
        return make_runner(model, config, path, progress, release=True)
    except ConfigError as error:
        raise ConfigError(f"{config.path}: {error}") from error


def make_runner(
    model: Any,
    config: ModelConfig,
    path: str = "",
    progress: Callable[[str], None] = lambda message: None,
    *,
    release: bool = False,
) -> Runner:
    """A runner over a module that is loaded already; see ``load_runner``.

    ``release``: the module is not needed afterwards; its weights may be let go of.
    """
    device, dtype = model.device, model.dtype
    fast = _want_fast(model, config.runner)
    facts = _facts(model, config, path, "llama" if fast else "generic")
    kinds, index = _kinds(model)
    slack = max(config.prefill_chunk, config.max_k + 1)
    pools = shared_pools(
        kinds,
        budget=_budget(config, device),
        itemsize=dtype.itemsize,
        max_sequences=config.max_sequences,
        slack=slack,
        max_positions=facts.max_positions + config.max_k + 1,
    )
    progress(f"allocating the arena, {next(iter(pools.values())).tokens} tokens")
    storage = Storage(kinds, pools, dtype=dtype, device=device)
    runner: Runner
    kernels = _kernel_runner(model, facts, storage, config, progress, release) if fast else None
    if device.type == "cpu" and config.threads is None and facts.weight_bytes < _ONE_THREAD:
        torch.set_num_threads(1)
    if kernels is not None:
        runner = kernels
    elif fast:
        runner = LlamaRunner(model, facts, storage)
    else:
        from outrider.shared.model.hf.runner import HfRunner  # transformers: seconds to import

        runner = HfRunner(model, facts, storage, index)
    if kernels is None:
        runner.pass_rows = config.prefill_chunk
    log.info(
        "%s (%s) on %s, %s: %s; arena of %d tokens, %d bytes",
        config.path,
        facts.architecture,
        device,
        facts.dtype,
        type(runner).__name__,
        storage.arena.tokens,
        storage.nbytes,
    )
    return runner


def _kernel_runner(
    model: Any,
    facts: ModelFacts,
    storage: Storage,
    config: ModelConfig,
    progress: Callable[[str], None],
    release: bool,
) -> Runner | None:
    """The runner with this project's kernels; None where they can't be used: the log says why."""
    kind = "cpu" if config.runner == "cpu" else storage.device.type
    if config.runner == "llama" or kind not in ("cpu", "cuda"):
        return None
    reason = _no_kernels(kind, model, storage)
    if reason is not None and config.runner == kind:
        raise ConfigError(f"runner: got {kind}; {reason}")
    if reason is not None:
        log.warning("%s runs without kernels: %s", config.path, reason)
        return None
    progress("compiling kernels")
    facts = replace(facts, runner=kind)
    if kind == "cuda":
        return _cuda_runner(model, facts, storage, config, progress)
    return _cpu_runner(model, facts, storage, config, progress, release)


def _no_kernels(kind: str, model: Any, storage: Storage) -> str | None:
    if kind == "cuda":
        from outrider.shared.model.cuda import support

        return support.why_not(model, storage.device, storage.dtype)
    from outrider.shared.model.cpu import runner

    return runner.why_not(model, storage)


def _cuda_runner(
    model: Any,
    facts: ModelFacts,
    storage: Storage,
    config: ModelConfig,
    progress: Callable[[str], None],
) -> Runner:
    from outrider.shared.model.cuda.runner import CudaRunner

    runner = CudaRunner(model, facts, storage, max_k=config.max_k)
    for choice in runner.choices:
        log.info("operation %s", choice)
    runner.warm_up(progress)
    return runner


def _cpu_runner(
    model: Any,
    facts: ModelFacts,
    storage: Storage,
    config: ModelConfig,
    progress: Callable[[str], None],
    release: bool,
) -> Runner:
    from outrider.shared.core.kept import cache_folder
    from outrider.shared.model.cpu.runner import CpuRunner
    from outrider.shared.model.cpu.threads import choose_threads

    kept = cache_folder(config.cache_dir)
    threads = config.threads or threads_allowed()
    runner = CpuRunner(model, facts, storage, threads=threads, kept=kept, release=release)
    if config.threads is None:
        progress("trying numbers of threads")
        choose_threads(runner, kept)
    log.info("%s: %s", config.path, runner.facts.kernels)
    return runner


def _kinds(model: Any) -> tuple[list[LayerKind], dict[int, int]]:
    """What each layer caches, and the model's layer index -> place among them."""
    if isinstance(model, LlamaForCausalLM):
        config = model.config
        kind = LayerKind(config.num_key_value_heads, config.head_dim, config.head_dim)
        count = config.num_hidden_layers
        return [kind] * count, {number: number for number in range(count)}
    from outrider.shared.model.hf.layer_kinds import layer_kinds  # transformers: seconds to import

    return layer_kinds(model)


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA, else MPS, else CPU. Raises ``ConfigError`` where it isn't there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"device: got {name}; this machine has {count} CUDA devices")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device: got {name}; this machine has none")
    return device


def _want_fast(model: Any, wish: str) -> bool:
    reason = why_not(model)
    if wish in ("llama", "cpu") and reason is not None:
        raise ConfigError(f"runner: got {wish}; {reason}")
    return wish != "generic" and reason is None


def _budget(config: ModelConfig, device: torch.device) -> int:
    if config.arena_bytes is not None:
        return config.arena_bytes
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * config.arena_share)
    if device.type == "mps":
        limit = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return int(limit * config.arena_share)
    return CPU_ARENA_BYTES


def _facts(model: Any, asked: ModelConfig, path: str, runner: str) -> ModelFacts:
    config = model.config.get_text_config(decoder=True)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    if eos is None:
        eos = config.eos_token_id
    ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return ModelFacts(
        name=asked.path,
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=_weight_bytes(model),
        vocab_size=vocab_size,
        vocab_fingerprint=fingerprint(path, vocab_size),
        max_positions=context_of(config, asked.max_positions),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        eos_token_ids=ids,
        runner=runner,
    )


def _weight_bytes(model: Any) -> int:
    """Bytes of all parameters; shared storage counts once, packed weights as they are packed."""
    sizes: dict[int, int] = {}
    todo: list[Any] = [parameter.data for parameter in model.parameters()]
    while todo:
        tensor = todo.pop()
        if hasattr(tensor, "__tensor_flatten__"):  # a subclass made of plain tensors
            names, _ = tensor.__tensor_flatten__()
            todo.extend(getattr(tensor, name) for name in names)
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
