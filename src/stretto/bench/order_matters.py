"""Where the order of guesses matters: a small task on which drafters are trained at equal tokens and compared.

A text lists six items; then, four times: an item of the list picked at random, its place in the list, its double. The
model cannot foresee the pick, but what follows is determined by it: a head that does not know which item was
guessed can only guess its place. Base and parts are trained here from nothing, in seconds, from one seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stretto.decoding.registry import make
from stretto.engine.engine import Engine
from stretto.engine.host import Host
from stretto.engine.params import SamplingParams
from stretto.engine.runner import Runner
from stretto.models.adapter import Adapter, Base
from stretto.models.config import ModelConfig
from stretto.models.transformer import Transformer
from stretto.training.data import Document, PackedData, pack
from stretto.training.nets import PackedNet, initialise
from stretto.training.objectives import Autoregressive
from stretto.training.parts import FrozenNet, make_part
from stretto.training.trainer import TrainConfig, Trainer

__all__ = ["VARIANTS", "compare", "text"]

ITEMS, LISTED, ROUNDS = 20, 6, 4
BOS, SEP, EOS, FIRST = 1, 2, 3, 4
PLACE, DOUBLE = FIRST + ITEMS, FIRST + ITEMS + LISTED
VOCABULARY = DOUBLE + ITEMS
LENGTH = 66  # three texts a row

VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {  # label -> kind of part, its options
    "medusa": ("medusa", {"heads": 3}),
    "clover": ("clover", {"heads": 3}),
    "clover, no attention decoder": ("clover", {"heads": 3, "attention": False}),
    "clover, no regressive connection": ("clover", {"heads": 3, "regressive": False}),
    "clover, no augmenting block": ("clover", {"heads": 3, "augment": 0}),
    "eagle": ("eagle", {"depth": 3, "ffn": 128}),
}


def text(rng: random.Random) -> Document:
    items = rng.sample(range(ITEMS), LISTED)
    tokens = [BOS, *(FIRST + i for i in items), SEP]
    for _ in range(ROUNDS):
        place = rng.randrange(LISTED)
        tokens += [FIRST + items[place], PLACE + place, DOUBLE + items[place]]
    return Document([*tokens, EOS], LISTED + 2)


def compare(
    variants: Sequence[str] = tuple(VARIANTS), *, base_steps: int = 600, steps: int = 250, seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """{"base_loss", "tokens", "rows": [{"variant", "top1", "top5", "tokens_per_forward", "parameters"}]}: accuracy of
    every head along held-out texts, and tokens per forward when the drafter decodes by itself at temperature 1."""
    say = say or (lambda text: None)
    say("the base")
    torch.manual_seed(seed)
    base = Transformer(
        ModelConfig(
            "qwen3", VOCABULARY, 64, 128, 2, 4, 2, 16, tie_word_embeddings=True, qk_norm=True, eos_token_ids=(EOS,),
        )
    )
    initialise(base, seed, layers=2)
    trainer = Trainer(base, PackedNet(base), Autoregressive(), _data(seed), _budget(base_steps, 6e-3))
    record = trainer.run()
    net, rows, read = FrozenNet(base), [], 0
    held_out = random.Random(f"held out {seed}")
    tests = [pack([text(held_out) for _ in range(96)], LENGTH, pad_id=0)]
    for label in variants:
        say(label)
        kind, options = VARIANTS[label]
        torch.manual_seed(seed)
        part = make_part(kind, net, **options)
        read = Trainer(part.module, net, part, _data(seed + 1), _budget(steps, 4e-3)).run().tokens
        found = part.statistics(tests)
        tensors = {n: t.detach().clone() for n, t in part.module.state_dict().items()}
        adapter = Adapter(kind, Base.of(base), tensors, part.config, found)
        rows.append({
            "variant": label, "top1": found["top1"], "top5": found["top5"], "parameters": adapter.parameters,
            "tokens_per_forward": _decode(base, adapter, seed),
        })
    return {"base_loss": record.loss, "tokens": read, "seed": seed, "rows": rows}


def _data(seed: int) -> PackedData:
    def pool(k: int) -> list[Document]:
        rng = random.Random(seed * 1_000_003 + k)
        return [text(rng) for _ in range(384)]

    return PackedData(pool, rows=16, length=LENGTH, pad_id=0, seed=seed)


def _budget(steps: int, lr: float) -> TrainConfig:
    return TrainConfig(steps=steps, lr=lr, adam_lr=lr, warmup=20, decay=0.5, weight_decay=0.01)


def _decode(base: Transformer, adapter: Adapter, seed: int, texts: int = 24) -> float:
    """Tokens per forward of sampled answers, with chains of three drafts and no planner."""
    runner = Runner(base, slots=4096)
    host = Host(runner, (EOS,), 256, plan=False, parts=lambda kind, name: adapter)
    engine = Engine(runner, host, prefix_caching=False)
    options = {"version": 1, "depth": 3} if adapter.kind == "eagle" else {}
    method, rng = make(adapter.kind, host, options), random.Random(f"prompts {seed}")
    streams = []
    for i in range(texts):
        prompt = list(text(rng).tokens[: LISTED + 2])
        params = SamplingParams(max_tokens=3 * ROUNDS, temperature=1.0, seed=i, ignore_eos=True)
        streams += engine.add(prompt, params, method)
    while engine.busy:
        engine.step()
    metrics = [s.seq.metrics for s in streams]
    return sum(m.tokens for m in metrics) / sum(m.forwards for m in metrics)
