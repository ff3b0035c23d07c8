"""From what is known of some patches to what is to be known of others: CAE's latent regressor."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6
"""Added to the variance in a layer norm."""


@final
class Regressor(nn.Module):
    """Cross-attention from hidden patches, of which only the places are known, to all (Chen et al. 2022, section 3)."""

    def __init__(self, width: int, heads: int, drop_paths: list[float], layer_scale: float | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(width, heads, rate, layer_scale) for rate in drop_paths)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, hidden: Tensor, seen: Tensor, hidden_places: Tensor, seen_places: Tensor) -> Tensor:
        """Features (B, M, D) of hidden patches, from those (B, V, D) of visible ones and the places of both."""
        places = torch.cat([seen_places, hidden_places], dim=1)  # (B, V + M, D)
        for block in self.blocks:
            hidden = block(hidden, torch.cat([seen, hidden], dim=1), hidden_places, places)
        features: Tensor = self.norm(hidden)
        return features


@final
class CrossBlock(nn.Module):
    """Cross-attention and perceptron; the second branch starts from, and is added to, the normalised first sum."""

    def __init__(self, width: int, heads: int, drop_path: float, layer_scale: float | None, ratio: int = 4) -> None:
        super().__init__()
        from timm.layers.drop import DropPath
        from timm.layers.layer_scale import LayerScale
        from timm.layers.mlp import Mlp

        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v, self.norm_out = (nn.LayerNorm(width, eps=EPS) for _ in range(4))
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)
        self.mlp = Mlp(width, ratio * width)
        self.scale1, self.scale2 = (
            nn.Identity() if layer_scale is None else LayerScale(width, layer_scale) for _ in range(2)
        )
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor, context: Tensor, places: Tensor, context_places: Tensor) -> Tensor:
        """(B, M, D), from queries (B, M, D) and context (B, L, D); values have no places."""
        queries, keys = self.norm_q(x + places), self.norm_k(context + context_places)
        x = x + self.drop(self.scale1(self._attended(queries, keys, self.norm_v(context))))
        x = self.norm_out(x)
        y: Tensor = x + self.drop(self.scale2(self.mlp(x)))
        return y

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = ((self.q, queries), (self.k, keys), (self.v, values))
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, x in parts)  # (B, heads, L, d)
        attended: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended
