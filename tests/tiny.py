"""Small random models for tests, and an engine around one."""

from __future__ import annotations

import copy
from functools import cache

import torch

from stretto.decoding.registry import make
from stretto.engine.engine import Engine
from stretto.engine.host import Host
from stretto.engine.params import SamplingParams
from stretto.engine.runner import Runner
from stretto.errors import UnsupportedError
from stretto.models.adapter import Adapter, Base
from stretto.models.config import ModelConfig
from stretto.models.transformer import Transformer
from stretto.training.parts import FrozenNet, make_part

V, EOS, MASK = 64, 3, 4


def config(**changes) -> ModelConfig:
    """A two-layer qwen3 of width 32; ``changes`` are Hugging Face keys."""
    base = dict(
        model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=V, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6,
        max_position_embeddings=512, tie_word_embeddings=True, rope_theta=10000.0, eos_token_id=EOS,
        hidden_act="silu", attention_bias=False,
    )
    return ModelConfig.from_hf(base | changes)


def model(seed: int = 0, scale: float = 3.0, **changes) -> Transformer:
    """Random weights; ``scale`` makes the laws sharp enough that greedy texts vary."""
    torch.manual_seed(seed)
    out = Transformer(config(**changes))
    with torch.no_grad():
        for name, p in out.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.1 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * scale / p.shape[-1] ** 0.5)
    return out.eval()


class Letters:
    """A text decoder in which every token is one printable character."""

    def push(self, ids):
        return "".join(chr(48 + i) for i in ids)

    def flush(self):
        return ""


_PARTS: dict = {}


@cache
def _other() -> Transformer:
    """The second model that an engine can open."""
    return model(seed=1)


def random_part(net: Transformer, kind: str, seed: int = 0, **options) -> Adapter:
    """A part of ``kind`` for ``net`` with random weights; "auto" and every other name mean it in ``engine``."""
    key = (id(net), kind, seed, repr(options))
    if key not in _PARTS:
        torch.manual_seed(seed)
        part = make_part(kind, FrozenNet(net), **options)
        with torch.no_grad():
            for p in part.module.parameters():
                p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
        tensors = {n: t.detach().clone() for n, t in part.module.state_dict().items()}
        _PARTS[key] = (net, Adapter(kind, Base.of(net), tensors, part.config))
    return _PARTS[key][1]


def engine(net: Transformer, *, slots: int = 4096, backend: str = "auto", stop=(EOS,), plan=False, **options):
    runner = Runner(copy.deepcopy(net) if backend == "torch" else net, slots=slots, backend=backend, deterministic=True)

    def open_runner(name: str) -> Runner:
        if name != "other":
            raise UnsupportedError(name)
        return Runner(copy.deepcopy(_other()), slots=slots, backend=backend, deterministic=True)

    host = Host(
        runner, tuple(stop), net.config.max_position_embeddings, open_runner, plan=plan,
        parts=lambda kind, name: random_part(_other() if name == "other" else net, kind),
    )
    return Engine(runner, host, make_decoder=lambda skip: Letters(), **options)


def run(eng: Engine, jobs, *, max_steps: int = 5000):
    """``jobs``: (prompt, params, method name, options); made methods are shared by name and options.

    Returns the streams, one list a job.
    """
    made, out = {}, []
    for prompt, params, name, options in jobs:
        key = (name, repr(options))
        if key not in made:
            made[key] = make(name, eng.host, options)
        out.append(eng.add(list(prompt), params, made[key]))
    for _ in range(max_steps):
        if not eng.busy:
            return out
        eng.step()
    raise AssertionError("the engine did not finish")


def tokens(stream) -> list[int]:
    return stream.seq.tokens[stream.seq.prompt_len :]


def greedy(tokens: int = 24, **more) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, **more)
