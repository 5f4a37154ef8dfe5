"""Deterministic mode on the torch forward: a row's bits depend on its own text alone. (The native forward has its own
tests.)"""

import random

import pytest
import torch

from stretto.decoding.registry import METHODS
from test_matrix import CASES
from tiny import V, engine, greedy, model, run, tokens

MOE = {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}


@pytest.fixture(scope="module", params=[{}, MOE], ids=["dense", "moe"])
def net(request):
    return model(**request.param)


def first_logits(net, prompts):
    eng = engine(net, backend="torch", prefix_caching=False)
    seen = []
    original = eng.runner.forward

    def spy(batch, *more):
        result = original(batch, *more)
        seen.append(result.logits.clone())
        return result

    eng.runner.forward = spy
    run(eng, [(p, greedy(1), "ar", {}) for p in prompts])
    return seen[0]


def test_bits_do_not_depend_on_batch_mates(net):
    rng = random.Random(0)
    texts = [[rng.randrange(5, V) for _ in range(n)] for n in (3, 20, 1, 33, 7)]
    together = first_logits(net, texts)
    for i, text in enumerate(texts):
        assert torch.equal(first_logits(net, [text])[0], together[i])


@pytest.mark.parametrize("name", [n for n, info in METHODS.items() if info.lossless and "causal" in info.kinds])
def test_lossless_methods_equal_plain_decoding(net, name):
    rng = random.Random(1)
    texts = [[rng.choice([5, 6, 7]) for _ in range(12)] for _ in range(3)]
    options = CASES.get(name, [{}])[0]
    got = run(engine(net, backend="torch"), [(t, greedy(16), name, options) for t in texts])
    want = run(engine(net, backend="torch"), [(t, greedy(16), "ar", {}) for t in texts])
    assert [tokens(s) for (s,) in got] == [tokens(s) for (s,) in want]
