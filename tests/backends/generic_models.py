"""Models that no family claims: of torch's own layers, and of a user's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH, VOCABULARY = 8, 11


class Attention(nn.Module):
    """Names that leave no doubt."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return self.o_proj(y)


class Block(nn.Module):
    """A user's own names, a shared layer, a transposed weight."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Attention(), Attention()
        self.widen, self.narrow = Conv1D(2 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x) + self.cross_attn(x)
        return x + self.shared(self.narrow(F.gelu(self.widen(x))))


class Mixed(nn.Module):
    """Indices [batch, length] -> logits. torch's transformer layers, attention of three widths, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        options = {"batch_first": True, "dropout": 0.0}
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, **options), 2)
        self.decoder = nn.TransformerDecoderLayer(WIDTH, 2, 16, **options)
        self.pool = nn.MultiheadAttention(WIDTH, 2, kdim=4, vdim=6, batch_first=True)
        shared = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(shared) for _ in range(2))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.decoder(x, self.encoder(x))
        x = x + self.pool(x, x[..., :4], x[..., :6], need_weights=False)[0]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.conv(x.mT).mT)


def mixed() -> Mixed:
    """In float64 and evaluation mode, with biases that are not zero, frozen for bitwise comparisons."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = Mixed()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.double().eval().requires_grad_(False)


def ids() -> Tensor:
    return torch.arange(10).view(2, 5)
