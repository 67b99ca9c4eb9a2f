"""The rival of train_step.py: the same decoder and training step in PyTorch, without megatron-core.

Written for speed on one device: packed projections, scaled-dot-product attention, fused AdamW. In bfloat16 it keeps float32 main
parameters and adds gradients in float32, as mixed-precision training does; otherwise it would do less work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""tokens and labels, int64 [b, s]"""


class Block(nn.Module):
    def __init__(self, hidden: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.gate_up, self.down = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, h = x.shape
        query, key, value = self.qkv(self.attention_norm(x)).view(b, s, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, is_causal=True)
        x = x + self.proj(context.transpose(1, 2).reshape(b, s, h))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [b, heads, s, d]; cos and sin [s, d / 2]."""
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class PlainGPT(nn.Module):
    def __init__(self, vocabulary_size: int, length: int, layers: int, hidden: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary_size, hidden), nn.Linear(hidden, vocabulary_size, bias=False)
        self.blocks = nn.ModuleList(Block(hidden, ffn, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        d = hidden // heads
        angles = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, d, 2) / d))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.reshape(-1))


class PlainTrainer:
    """A model with its optimizer. `step` is one training step."""

    def __init__(self, model: PlainGPT, dtype: torch.dtype, lr: float, weight_decay: float) -> None:
        self.parameters = list(model.parameters())
        self.main = self.parameters
        if dtype != torch.float32:
            self.main = [parameter.detach().clone().requires_grad_() for parameter in self.parameters]
            model.to(dtype)
        self.model = model
        matrices, norms = ([p for p in self.main if (p.dim() > 1) == wanted] for wanted in (True, False))
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": norms, "weight_decay": 0.0}], lr=lr, weight_decay=weight_decay, fused=True
        )

    def step(self, batches: Sequence[Batch]) -> float:
        """Train on microbatches of equal size. Returns their mean loss before the step."""
        total = 0.0
        for tokens, labels in batches:
            loss = self.model(tokens, labels) / len(batches)
            loss.backward()
            total += loss.item()
            if self.main is not self.parameters:
                self._accumulate()
        torch.nn.utils.clip_grad_norm_(self.main, 1.0)
        self.optimizer.step()
        if self.main is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.main)
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _accumulate(self) -> None:
        for parameter, main in zip(self.parameters, self.main, strict=True):
            assert parameter.grad is not None
            if main.grad is None:
                main.grad = parameter.grad.float()
            else:
                main.grad.add_(parameter.grad)
            parameter.grad = None
