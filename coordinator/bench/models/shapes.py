"""The sizes of well-known models: what their speed depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of an architecture that cost time; ``gpt2`` has learned positions."""

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int

    @property
    def step_bytes(self) -> int:
        """Weight bytes that a step of one row reads, in 16-bit types (norms left out)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        width = 3 if self.architecture == "llama" else 2
        block = attention + width * self.hidden * self.intermediate
        return 2 * (self.layers * block + self.vocabulary * self.hidden)


SHAPES = {
    "llama-3.2-3b": ModelShape("llama", 3072, 28, 24, 8, 128, 8192, 128256, 131072),
    "llama-3.2-1b": ModelShape("llama", 2048, 16, 32, 8, 64, 8192, 128256, 131072),
    "llama-3.1-8b": ModelShape("llama", 4096, 32, 32, 8, 128, 14336, 128256, 131072),
    "gpt2": ModelShape("gpt2", 768, 12, 12, 12, 64, 3072, 50257, 1024),
    "distilgpt2": ModelShape("gpt2", 768, 6, 12, 12, 64, 3072, 50257, 1024),
    # The bundled pair's, with room for longer texts.
    "pair-base": ModelShape("llama", 384, 8, 6, 2, 64, 640, 8192, 8192),
    "pair-draft": ModelShape("llama", 160, 2, 4, 2, 64, 384, 8192, 8192),
    "tiny": ModelShape("llama", 128, 2, 4, 2, 32, 256, 512, 2048),
}
