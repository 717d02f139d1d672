"""The arena as a transformers cache: Hugging Face's own generate, rings, views without copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.kv.storage import Storage, shared_pools
from outrider.shared.model.hf.cache import ArenaCache
from outrider.shared.model.hf.layer_kinds import layer_kinds
from outrider.shared.model.loading import load_runner
from outrider_testing import engines

WINDOW = 8
MIXED = ["sliding_attention", "full_attention"]


def gemma2(layers: int = 2) -> Any:
    return engines.tiny_gemma2(
        window=WINDOW,
        intermediate_size=48,
        num_hidden_layers=layers,
        query_pre_attn_scalar=8,
        initializer_range=0.2,
        max_position_embeddings=256,
        layer_types=MIXED[:layers],
    )


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            max_position_embeddings=256,
            sliding_window=WINDOW,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()


@pytest.fixture(params=["llama", "gpt2", "mistral", "gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    makers = {
        "llama": engines.tiny_llama,
        "gpt2": engines.tiny_gpt2,
        "mistral": mistral,
        "gemma2": gemma2,
    }
    return makers[request.param]()


def arena_cache(model: Any, capacity: int, batch: int = 1) -> ArenaCache:
    """A cache of its own for ``batch`` sequences of ``capacity`` tokens."""
    kinds, index = layer_kinds(model)
    pools = shared_pools(
        kinds,
        budget=1 << 24,
        itemsize=model.dtype.itemsize,
        max_sequences=batch,
        slack=64,
        max_positions=capacity,
    )
    storage = Storage(kinds, pools, dtype=model.dtype, device=model.device)
    return ArenaCache(storage, [storage.arena.admit(capacity) for _ in range(batch)], index)


def generated(model: Any, ids: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prompt", [1, 5, 40])
def test_generate_with_the_arena_as_its_cache_gives_the_same_tokens(
    model: Any, batch: int, prompt: int
) -> None:
    ids = torch.randint(0, 97, (batch, prompt), generator=torch.Generator().manual_seed(prompt))
    cache = arena_cache(model, prompt + 50, batch)
    wanted = generated(model, ids, 50)
    assert torch.equal(generated(model, ids, 50, past_key_values=cache), wanted)
    assert cache.get_seq_length() == prompt + 49


def test_generate_with_beams_and_the_arena_gives_the_same_tokens(model: Any) -> None:
    ids = torch.randint(0, 97, (1, 7), generator=torch.Generator().manual_seed(1))
    cache = arena_cache(model, 7 + 20, 3)
    wanted = generated(model, ids, 20, num_beams=3)
    assert torch.equal(generated(model, ids, 20, num_beams=3, past_key_values=cache), wanted)


def test_generate_goes_on_from_a_cache_that_holds_a_prefix() -> None:
    model = engines.tiny_llama()
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(2))
    cache = arena_cache(model, 60)
    first = generated(model, ids, 10, past_key_values=cache)
    more = generated(model, first, 10, past_key_values=cache)
    assert torch.equal(more, generated(model, ids, 20))


def test_full_layers_are_returned_as_views_of_the_arena() -> None:
    model = engines.tiny_llama()
    cache = arena_cache(model, 32, 2)
    fresh = torch.randn(2, 2, 5, 8)
    keys, values = cache.update(fresh, fresh + 1, 0)
    again, _ = cache.update(fresh, fresh + 1, 0)
    storage = cache.layers[0]._storage.tensors[0].untyped_storage().data_ptr()
    assert keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() == storage
    assert keys.data_ptr() == again.data_ptr()
    assert torch.equal(again, torch.cat([fresh, fresh], dim=2))


def test_rings_cost_what_the_window_needs_not_the_context() -> None:
    """Memory of a mixed model: the sliding half stays the same, however long the context is."""
    kinds, _ = layer_kinds(gemma2())
    assert [kind.window for kind in kinds] == [WINDOW, None]
    runners = [
        engines.runner(gemma2(), arena_bytes=1 << 22, max_sequences=4, prefill_chunk=6, max_k=4),
        engines.runner(gemma2(), arena_bytes=1 << 24, max_sequences=4, prefill_chunk=6, max_k=4),
    ]
    rings = [next(p for p in r.arena.pools if p.window is not None) for r in runners]
    assert [ring.tokens for ring in rings] == [4 * (WINDOW + 6)] * 2
    extent = runners[0].arena.admit(200)
    assert [size for _, size in extent.places] == [200, WINDOW + 6]


@pytest.mark.parametrize("maker", [mistral, gemma2])
@pytest.mark.parametrize("chunk", [1, 4, 6])
def test_many_windows_long_generation_keeps_parity(maker: Any, chunk: int) -> None:
    from outrider.draft_service.engine import DraftEngine
    from outrider.verify_service.engine import VerifyEngine

    asked = [engines.prompts(1, seed=n, shortest=n, longest=n)[0] for n in (2, 37)]
    wanted = [engines.reference(maker(), prompt, 60) for prompt in asked]
    base = engines.runner(maker(), max_k=4, prefill_chunk=6)
    verify = VerifyEngine(base, 4)
    other = DraftEngine(engines.runner(engines.tiny_llama(5, layers=1)), 4)
    for draft in (DraftEngine(base, 4), other):
        courses = engines.speculate(verify, draft, asked, 60, 4, chunk=chunk)
        assert [course.written for course in courses] == wanted
    # A prompt in one message is taken in by as many forwards as the ring needs.
    courses = engines.speculate(verify, None, asked, 60, 0)
    assert [course.written for course in courses] == wanted


def test_a_model_without_keys_and_values_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ConfigError, match="LinearAttention"):
        arena_cache(model, 32)


def gemma3n(borrowing: int) -> Any:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(0)
    return Gemma3nForCausalLM(
        Gemma3nTextConfig(
            vocab_size=97,
            vocab_size_per_layer_input=97,
            hidden_size=32,
            hidden_size_per_layer_input=8,
            intermediate_size=48,
            num_hidden_layers=4,
            num_kv_shared_layers=borrowing,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            laurel_rank=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 4,
            max_position_embeddings=256,
            sliding_window=WINDOW,
            layer_types=MIXED * 2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()


def test_layers_that_read_another_layer_s_keys_are_refused_where_they_are(tmp_path: Path) -> None:
    # The same model without such layers is served, so it is they that are refused.
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(3))
    alone = gemma3n(0)
    wanted = generated(alone, ids, 20)
    cache = arena_cache(alone, 40)
    assert torch.equal(generated(alone, ids, 20, past_key_values=cache), wanted)
    model = gemma3n(2)
    for build in (lambda: arena_cache(model, 40), lambda: engines.runner(model)):
        with pytest.raises(ConfigError, match="reads the keys and values of another layer"):
            build()
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="2 layers that read the keys and values of another"):
        load_runner(ModelConfig(path=str(tmp_path), device="cpu"))


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_quantized_models_pass_through(bits: int) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from outrider.draft_service.engine import DraftEngine
    from outrider.verify_service.engine import VerifyEngine

    model = engines.tiny_llama(1, hidden=64)
    plain = engines.tiny_llama(1, hidden=64)
    if bits == 8:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    else:
        torchao.quantize_(
            model,
            torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32)),
        )
    asked = engines.prompts(3, seed=4)
    wanted = [engines.reference(model, prompt, 20) for prompt in asked]
    runner = engines.runner(model)
    assert runner.facts.runner == "generic"
    draft = DraftEngine(engines.runner(plain), 4)
    courses = engines.speculate(VerifyEngine(runner, 4), draft, asked, 20, 4)
    assert [course.written for course in courses] == wanted
