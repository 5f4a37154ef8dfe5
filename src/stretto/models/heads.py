"""Parts that guess tokens ahead from a frozen model's hidden states.

Legend: n rows, H width, V vocabulary, K heads. W_LM [V, H] are the rows of the frozen LM head, which all heads share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MedusaHeads"]


class MedusaHeads(nn.Module):
    """Medusa (arXiv 2401.10774): head i guesses the token i + 2 places behind the row, h_i = x + silu(W_i x).

    W_i starts at zero, so that every head starts as the model's own next-token law. The paper gives each head a
    vocabulary projection of its own; here all share W_LM, which keeps four heads of width 192 at 150,000 parameters
    instead of 1.7 million. One matrix W [K H, H] holds all W_i.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.zeros(heads * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, H] final-normed states -> [n, K, H] inputs of the LM head"""
        return x[:, None] + F.silu(F.linear(x, self.weight)).view(len(x), self.heads, -1)
