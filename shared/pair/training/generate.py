"""Batched generation with a static KV cache, as fast as eager code and a CUDA graph allow."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from model import Llama, rotate
from torch import Tensor


class Generator:
    """Continues `batch` prompts of different lengths to exactly `length` tokens each.

    Rows keep their own position, so prompts are padded on the right and the padding's KV is
    overwritten as the row advances. Rows do not stop at END: text after it counts as well.
    """

    def __init__(
        self, model: Llama, batch: int, length: int, dtype: torch.dtype, graph: bool = True
    ) -> None:
        device, s = model.cos.device, model.shape
        self.model = copy.deepcopy(model).requires_grad_(False).to(dtype)
        self.model.cos, self.model.sin, self.model.dtype = model.cos, model.sin, dtype
        self.batch, self.length, self.dtype = batch, length, dtype
        kv = (s.num_hidden_layers, batch, s.num_key_value_heads, length, s.head_dim)
        self.keys, self.values = (torch.zeros(kv, dtype=dtype, device=device) for _ in range(2))
        self.rows = torch.arange(batch, device=device)
        self.columns = torch.arange(length, device=device)
        self.tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.position = torch.zeros(batch, dtype=torch.long, device=device)
        self.temperature = torch.zeros(batch, device=device)
        self.graph = None
        self.want_graph = graph and device.type == "cuda"

    def _choose(self, logits: Tensor) -> Tensor:
        """argmax(logits + temperature * Gumbel noise): greedy where the temperature is 0."""
        logits = logits.float()
        uniform = torch.rand_like(logits).clamp_(1e-20, 1.0)
        noise = -torch.log(-torch.log(uniform).clamp_max(-1e-7))
        return (logits + self.temperature[:, None] * noise).argmax(-1)

    def _write(self, token: Tensor) -> None:
        """Puts `token` [batch] at each row's position unless the row is already full."""
        place = self.position.clamp(max=self.length - 1)
        old = self.tokens[self.rows, place]
        self.tokens[self.rows, place] = torch.where(self.position < self.length, token, old)

    def _step(self) -> None:
        """Feeds the token before each row's position and writes the one that follows it."""
        s, m = self.model.shape, self.model.model
        last = (self.position - 1).clamp(max=self.length - 1)
        x = m.embed_tokens(self.tokens[self.rows, last])
        cos, sin = self.model.cos[last][:, None], self.model.sin[last][:, None]
        hidden = (self.columns[None] > last[:, None])[:, None, None]
        for i, layer in enumerate(m.layers):
            a, h = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                p(h).view(self.batch, -1, s.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj)
            )
            self.keys[i][self.rows, :, last] = rotate(k, cos, sin)
            self.values[i][self.rows, :, last] = v
            q = rotate(q, cos, sin).view(self.batch, s.num_key_value_heads, -1, s.head_dim)
            scores = (q @ self.keys[i].mT).float() * s.head_dim**-0.5
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(self.dtype)
            x = x + a.o_proj((weights @ self.values[i]).reshape(self.batch, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self._write(self._choose(F.linear(m.norm(x), m.embed_tokens.weight)))
        self.position.add_(1)

    def _capture(self) -> None:
        """Records one step as a CUDA graph; stays eager, and says so, where that fails."""
        self.want_graph = False
        saved = [t.clone() for t in (self.tokens, self.position)]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.graph = graph
        except RuntimeError as error:
            print(f"generation runs without a CUDA graph: {error}", flush=True)
            torch.cuda.synchronize()
        self.tokens.copy_(saved[0])
        self.position.copy_(saved[1])

    @torch.no_grad()
    def run(self, prompts: Tensor, lengths: Tensor, temperature: Tensor) -> Tensor:
        """prompts [batch, width] (right-padded), lengths, temperature [batch] -> ids."""
        width = prompts.shape[1]
        self.tokens.zero_()
        self.tokens[:, :width] = prompts
        self.temperature.copy_(temperature)
        last = []
        for begin in range(0, self.batch, 512):  # prefill in pieces: its logits are large
            part, kept = slice(begin, begin + 512), []
            logits = self.model(prompts[part], kept)
            for i, (k, v) in enumerate(kept):
                self.keys[i, part, :, :width], self.values[i, part, :, :width] = k, v
            rows = torch.arange(logits.shape[0], device=logits.device)
            last.append(logits[rows, lengths[part] - 1])
        self.position.copy_(lengths)
        self._write(self._choose(torch.cat(last)))
        self.position.add_(1)
        if self.want_graph:
            self._capture()
        for _ in range(self.length - int(lengths.min()) - 1):
            self.graph.replay() if self.graph is not None else self._step()
        return self.tokens.clone()
