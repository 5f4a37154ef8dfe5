"""Parts that guess tokens ahead from a frozen model's hidden states.

Legend: n rows, b texts of t places, H width, V vocabulary, K heads, A attention heads of D, G key heads. f [H]: the
model's final-normed state of a row; W_LM [V, H]: the rows of its LM head, frozen and shared by all parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stretto.models.config import ModelConfig
from stretto.models.context import PackedContext
from stretto.models.rope import apply_rope
from stretto.models.transformer import Block, RMSNorm, Transformer

__all__ = ["AttentionDecoder", "CloverHeads", "EagleLayer", "MedusaHeads", "layer_config", "run_layers", "with_layers"]


class MedusaHeads(nn.Module):
    """Medusa (arXiv 2401.10774): head i guesses the token i + 2 places behind the row, h_i = f + silu(W_i f).

    W_i starts at zero, so that every head starts as the model's own next-token law. The paper gives each head a
    vocabulary projection of its own; here all share W_LM, which keeps four heads of width 192 at 150,000 parameters
    instead of 1.7 million. One matrix W [K H, H] holds all W_i.
    """

    def __init__(self, config: ModelConfig, *, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.zeros(heads * config.hidden_size, config.hidden_size))

    def forward(self, f: Tensor) -> Tensor:
        """[n, H] -> [n, K, H] inputs of the LM head"""
        return f[:, None] + F.silu(F.linear(f, self.weight)).view(len(f), self.heads, -1)


class AttentionDecoder(nn.Module):
    """Clover's attention over a single key: g = h + concat over heads of cos(q, k) v.

    A softmax over one key would always be 1, so the weight is the cosine. q = W_Q norm(h), k = W_K e, v = W_V e, with
    biases; no output projection, no rotation.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.hidden_size
        self.eps, self.heads = config.rms_norm_eps, _divisor(width, config.num_attention_heads)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        with torch.no_grad():
            for linear, eye in ((self.q, 1.0), (self.k, 1.0), (self.v, 0.0)):
                linear.weight.uniform_(-0.01, 0.01).add_(eye * torch.eye(width))
                linear.bias.zero_()

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """h, e [n, H] -> g [n, H]"""
        return h + self.weigh(self.q(self.norm(h)), self.k(e), self.v(e))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """cos(q, k) v per head, [n, H]; a vector of zeros has cosine 0."""
        q, k, v = (x.view(len(q), self.heads, -1) for x in (q, k, v))
        return (F.cosine_similarity(q, k, -1, self.eps)[..., None] * v).flatten(1)


class CloverHeads(nn.Module):
    """Clover (arXiv 2405.00263) and Clover-2 (2408.00264): a chain of heads that know the tokens guessed before.

    ``augment``: layers of the augmenting block, run once a row over the whole text with K/V of their own; h_0 is their
    output. Head i = 1..K: g_i = AttentionDecoder(h_{i-1}, e_{i-1}), e the normalised row of W_LM of the token before.
    Version 1: h_i = g_i + silu(W_i g_i), logits W_LM h_i. Version 2: a decoder in front mixes e_0 into f,
    h_1 = L_1 h_0, h_i = L_2 [g_i; e_{i-1}] with one L_2 for all later heads, logits W_LM norm(h_i).
    Ablations: ``attention=False`` adds v instead of weighing it; ``regressive=False`` gives every head h_0 and e_0.
    """

    def __init__(
        self, config: ModelConfig, *, version: int = 1, heads: int = 3, augment: int = 1, ffn: int = 64,
        attention: bool = True, regressive: bool = True,
    ):
        super().__init__()
        width = config.hidden_size
        self.version, self.heads, self.attention, self.regressive = version, heads, attention, regressive
        self.layers = _blocks(config, augment, ffn)
        self.decoder = AttentionDecoder(config)
        if version == 1:
            self.weight = nn.Parameter(torch.zeros(heads, width, width))
            return
        self.front = AttentionDecoder(config)
        self.first, self.later = nn.Linear(width, width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        with torch.no_grad():
            self.first.weight.uniform_(-0.01, 0.01).add_(torch.eye(width))
            self.later.weight.uniform_(-0.01, 0.01)[:, :width].add_(torch.eye(width))

    def entry(self, f: Tensor, e: Tensor) -> Tensor:
        """What the augmenting block reads: f [n, H], with e_0 [n, H] mixed in by version 2."""
        return f if self.version == 1 else self.front(f, e)

    def attend(self, h: Tensor, e: Tensor) -> Tensor:
        return self.decoder(h, e) if self.attention else h + self.decoder.v(e)

    def head(self, i: int, h: Tensor, e: Tensor) -> Tensor:
        """h_i [n, H] from h_{i-1} and e_{i-1}; i = 1..K (version 2 goes on behind K with the same weights)."""
        if self.version == 1:
            g = self.attend(h, e)
            return g + F.silu(F.linear(g, self.weight[i - 1]))
        return self.first(h) if i == 1 else self.later(torch.cat([self.attend(h, e), e], -1))

    def out(self, h: Tensor) -> Tensor:
        """The input of the LM head, [n, H]."""
        return h if self.version == 1 else self.norm(h)

    def chain(self, h0: Tensor, es: Sequence[Tensor]) -> list[Tensor]:
        """h_1..h_K [n, H] along given tokens: ``es[i]`` [n, H] is e_i."""
        out, h = [], h0
        for i, e in enumerate(es, 1):
            h = self.head(i, h, e) if self.regressive else self.head(i, h0, es[0])
            out.append(h)
        return out


class EagleLayer(nn.Module):
    """EAGLE (arXiv 2401.15077) and EAGLE-3 (2503.01840): one decoder layer that foresees the model's next feature.

    Row n reads x = FC [e(token n + 1); g_n]. Version 1: g = f, and the output is the guess of f_{n+1}, which W_LM turns
    into the law of token n + 2. Version 3: g = M [low; mid; high], states after three layers of the model; logits are
    W_LM norm(output). Deeper guesses feed the layer its own output as g. Unlike EAGLE-1's code the layer keeps its
    input norm, and unlike EAGLE-3's it reads FC's mix, not a pair twice as wide: so it is the model's own block.
    """

    def __init__(self, config: ModelConfig, *, version: int = 1, ffn: int = 256, depth: int = 5):
        super().__init__()
        width, layers = config.hidden_size, config.num_hidden_layers
        self.version, self.depth = version, depth  # the depth it was trained for
        self.taps = (-1,) if version == 1 else (max(1, layers // 6), max(1, layers // 2), max(1, layers - 1))
        self.fc = nn.Linear(2 * width, width)
        self.layers = _blocks(config, 1, ffn)
        self.mix = nn.Linear(len(self.taps) * width, width) if version == 3 else None
        self.norm = RMSNorm(width, config.rms_norm_eps) if version == 3 else None
        with torch.no_grad():
            self.fc.weight.normal_(0, (2 * width) ** -0.5)[:, width:].add_(torch.eye(width))
            self.fc.bias.zero_()
            if self.mix is not None:
                self.mix.weight.mul_(0.5)[:, -width:].add_(torch.eye(width))

    def feature(self, states: Sequence[Tensor]) -> Tensor:
        """g [n, H] of the model's states after ``taps``."""
        return states[0] if self.mix is None else self.mix(torch.cat(list(states), -1))

    def entry(self, e: Tensor, g: Tensor) -> Tensor:
        """x [n, H] of embeddings e and features g."""
        return self.fc(torch.cat([e, g], -1))

    def out(self, a: Tensor) -> Tensor:
        """The input of the LM head for outputs a [n, H]."""
        return a if self.norm is None else self.norm(a)

    def unroll(
        self, g: Tensor, embeds: Sequence[Tensor], angles: Sequence[tuple[Tensor, Tensor]], mask_btt: Tensor
    ) -> list[Tensor]:
        """The outputs [b t, H] of len(embeds) depths along given tokens: the test-time loop of EAGLE-3.

        ``embeds[j]`` [b t, H]: of token n + 1 + j; ``angles[j]``: of position n + j. Row n of depth j sees the rows of
        depth 0 up to n (``mask_btt``), and its own rows of the depths before.
        """
        out, keys, values = [], [], []
        block = self.layers[0]
        attn, b = block.self_attn, len(mask_btt)
        for e, angle in zip(embeds, angles, strict=True):
            x = self.entry(e, g)
            q, k, v = attn._qkv(block.input_layernorm(x))
            if attn.q_norm is not None:
                q, k = attn.q_norm(q), attn.k_norm(k)
            q, k = apply_rope(q, *angle), apply_rope(k, *angle)
            share = q.shape[1] // k.shape[1]
            keys.append(k.repeat_interleave(share, 1))
            values.append(v.repeat_interleave(share, 1))
            x = x + attn.o_proj(_diagonal_attention(q, keys, values, mask_btt, b).reshape(len(x), -1))
            g = x + block.mlp(block.post_attention_layernorm(x))
            out.append(g)
        return out


def _diagonal_attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask_btt: Tensor, b: int
) -> Tensor:
    """q [b t, A, D] over the rows of ``keys[0]`` that the mask shows, and row by row over the later keys."""
    t, scale = len(q) // b, q.shape[-1] ** -0.5
    q4, k4, v4 = (x.view(b, t, *x.shape[1:]) for x in (q, keys[0], values[0]))
    scores = torch.einsum("btad,bsad->bats", q4, k4) * scale
    scores = scores.float().masked_fill(~mask_btt[:, None], -1e9)
    for k in keys[1:]:
        own = (q * k).sum(-1).view(b, t, -1).permute(0, 2, 1)[..., None] * scale
        scores = torch.cat([scores, own.float()], -1)
    p = scores.softmax(-1).to(q.dtype)
    out = torch.einsum("bats,bsad->btad", p[..., :t], v4).reshape(q.shape)
    for j, v in enumerate(values[1:]):
        out = out + p[..., t + j].permute(0, 2, 1).reshape(len(q), -1, 1) * v
    return out


def layer_config(config: ModelConfig, layers: int, ffn: int) -> ModelConfig:
    """The shape of ``layers`` extra blocks like the model's, with a feed-forward of width ``ffn``."""
    return config.changed(
        num_hidden_layers=layers, intermediate_size=ffn, moe=None, windows=(), attention="causal", block_size=1,
        mask_token_id=None,
    )


def with_layers(base: Transformer, layers: nn.ModuleList, norm: nn.Module | None = None) -> Transformer:
    """A transformer of these blocks that reads embeddings only, for a runner of its own. ``norm``: its final norm."""
    ffn = len(layers[0].mlp.gate_proj.weight)
    config = layer_config(base.config, len(layers), ffn).changed(
        vocab_size=1, tie_word_embeddings=True, bos_token_id=None, pad_token_id=None, eos_token_ids=(),
    )
    out = Transformer(config, device="meta")
    out.model.layers = layers
    out.model.embed_tokens = nn.Embedding(1, config.hidden_size)
    out.model.norm = norm or RMSNorm(config.hidden_size, config.rms_norm_eps)
    return out.to(base.device).requires_grad_(False).eval()


def run_layers(layers: nn.ModuleList, x: Tensor, angles: tuple[Tensor, Tensor], ctx: PackedContext) -> Tensor:
    """x [n, H] through extra blocks, over packed rows."""
    for block in layers:
        x = block(x, angles, ctx)
    return x


def _blocks(config: ModelConfig, layers: int, ffn: int) -> nn.ModuleList:
    if not layers:
        return nn.ModuleList()
    c = layer_config(config, layers, ffn)
    out = nn.ModuleList(Block(c, i) for i in range(layers))
    with torch.no_grad():
        for name, p in out.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.mul_(0.1)
    return out


def _divisor(width: int, heads: int) -> int:
    """The largest number of heads up to ``heads`` that divides ``width``."""
    return next(n for n in range(heads, 0, -1) if width % n == 0)
