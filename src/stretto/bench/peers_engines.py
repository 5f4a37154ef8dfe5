"""The engines that ``bench --peers`` sets side by side, each behind the same two calls, on one random checkpoint.

``offers``: which measurements a peer can do: "one row", "rows", "batch".
``decode(prompts, tokens)``: seconds to complete every prompt with exactly so many tokens, greedy, as one batch.
``rows(n, context)``: seconds of one forward of ``n`` rows on ``context`` cached ones, logits included.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stretto.errors import MissingExtraError, UnsupportedError

__all__ = ["ENGINES", "Continuous", "Llama", "Ours", "Transformers", "write_checkpoint"]

REPEATS = 7  # forwards per point of a row curve; their median counts

Prompts = Sequence[list[int]]


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A checkpoint of random bf16 weights in Hugging Face layout, with the zoo's tokenizer."""
    import torch

    from stretto.models.checkpoint import save
    from stretto.models.config import ModelConfig
    from stretto.models.transformer import Transformer
    from stretto.zoo.models import TOKENIZER

    model = Transformer(ModelConfig.from_hf(config), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02, generator=generator)
    save(model, folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


class Ours:
    """stretto's own engine; ``plan=False`` keeps methods from switching themselves off."""

    name = "stretto"

    def __init__(self, folder: Path, threads: int, *, deterministic: bool = False, plan: bool = True):
        from stretto.llm import LLM

        self._llm = LLM(
            folder, dtype="bfloat16", device="cpu", threads=threads, enable_prefix_caching=False, plan=plan,
            deterministic=deterministic,
        )

    @property
    def backend(self) -> str:
        return self._llm.runner.backend

    def decode(self, prompts: Prompts, tokens: Sequence[int], method: str = "ar") -> float:
        from stretto.engine.params import SamplingParams

        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in tokens]
        start = time.perf_counter()
        outputs = self._llm.generate([list(p) for p in prompts], params, method=method)
        seconds = time.perf_counter() - start
        check(self.name, [len(o.outputs[0].token_ids) for o in outputs], tokens)
        return seconds

    def rows(self, n: int, context: int) -> float:
        return self._llm.runner.curve(context)(n)

    def forward(self, n: int, kind: str, context: int) -> Callable[[], Any]:
        """A forward of ``n`` rows on ``context`` cached ones: a "chain", a "block" that sees itself, or a "tree"."""
        runner = self._llm.runner
        slots = runner.alloc.alloc(context + n)
        paths = {
            "chain": [range(i + 1) for i in range(n)],
            "block": [range(n)] * n,
            "tree": [sorted({(i + 1 >> up) - 1 for up in range((i + 1).bit_length())}) for i in range(n)],  # binary
        }
        return partial(runner.forward, _rows_batch(slots[:context], slots[context:], paths[kind]))


def _rows_batch(context: Any, slots: Any, paths: Sequence[Sequence[int]]) -> Any:
    """Rows of one sequence behind the slots ``context``, all with logits; row i sees the rows ``paths[i]``."""
    import numpy as np

    from stretto.models.batch import FlatBatch

    def ints(values: Any) -> Any:
        return np.asarray(values, np.int32)

    n, ends = len(paths), np.cumsum([0] + [len(p) for p in paths])
    return FlatBatch(
        tokens=np.zeros(n, np.int64), positions=ints(len(context) + np.arange(n)), slots=ints(slots),
        context_of=np.zeros(n, np.int32), context=ints(context), context_ptr=ints([0, len(context)]),
        local=np.concatenate([ints(p) for p in paths]), local_ptr=ints(ends), logit_rows=ints(np.arange(n)),
    )


class Transformers:
    """transformers' ``generate``, uncompiled, with its default attention; several prompts are padded to the left."""

    name, package, offers = "transformers generate", "transformers", ("one row", "rows", "batch")

    def __init__(self, folder: Path, threads: int):
        _need(self.package)
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as chatter

        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.model.generation_config.eos_token_id = None

    def decode(self, prompts: Prompts, tokens: Sequence[int]) -> float:
        torch, width, most = self._torch, max(map(len, prompts)), max(tokens)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0)
        seconds = time.perf_counter() - start
        check(self.name, [out.shape[1] - width], [most])
        return seconds

    def rows(self, n: int, context: int) -> float:
        torch, times = self._torch, []
        with torch.inference_mode():
            cache = self.model(torch.zeros(1, context, dtype=torch.long), use_cache=True).past_key_values
            for _ in range(REPEATS):
                start = time.perf_counter()
                self.model(torch.zeros(1, n, dtype=torch.long), past_key_values=cache, use_cache=True)
                times.append(time.perf_counter() - start)
                cache.crop(-n)
        return statistics.median(times)


class Continuous:
    """transformers' own continuous batching; the manager is made once, sized for the work, and kept."""

    name, package, offers = "transformers continuous batching", "transformers", ("batch",)

    def __init__(self, folder: Path, threads: int):
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._model = Transformers(folder, threads).model
        self._manager: Any = None

    def decode(self, prompts: Prompts, tokens: Sequence[int]) -> float:
        if self._manager is None:
            self._start(max(len(p) + n for p, n in zip(prompts, tokens, strict=True)) * len(prompts))
        start = time.perf_counter()
        wanted = {
            self._manager.add_request(list(p), max_new_tokens=n): n for p, n in zip(prompts, tokens, strict=True)
        }
        made: dict[str, int] = {}
        while len(made) < len(wanted):
            result = self._manager.get_result(timeout=60)
            if result is None or result.error:
                raise UnsupportedError(f"no result within a minute: {result.error if result else 'timeout'}")
            made[result.request_id] = len(result.generated_tokens)
        seconds = time.perf_counter() - start
        check(self.name, [made[k] for k in wanted], list(wanted.values()))
        return seconds

    def _start(self, slots: int) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        page = 256
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=512),
            continuous_batching_config=ContinuousBatchingConfig(page_size=page, num_blocks=2 * slots // page + 32),
        )
        self._manager.start()

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=20)


class Llama:
    """llama.cpp through llama-cpp-python, on the same weights as a bf16 GGUF file; one prompt at a time."""

    name, package, offers = "llama.cpp", "llama-cpp-python", ("one row", "rows")

    def __init__(self, folder: Path, threads: int):
        llama_cpp = _need("llama_cpp", self.package)
        from stretto.bench.gguf_file import write_gguf

        file = folder / "model.gguf"
        if not file.exists():
            write_gguf(folder, file)
        self._llama = llama_cpp.Llama(
            str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_batch=512, logits_all=True,
            verbose=False,
        )

    def decode(self, prompts: Prompts, tokens: Sequence[int]) -> float:
        llama = self._llama
        llama.reset()
        start = time.perf_counter()
        llama.eval(list(prompts[0]))
        for _ in range(tokens[0] - 1):
            llama.eval([int(llama.scores[llama.n_tokens - 1].argmax())])
        return time.perf_counter() - start

    def rows(self, n: int, context: int) -> float:
        llama, times = self._llama, []
        llama.reset()
        llama.eval([1] * context)
        for _ in range(REPEATS):
            start = time.perf_counter()
            llama.eval([1] * n)
            times.append(time.perf_counter() - start)
            llama._ctx.kv_cache_seq_rm(-1, context, -1)
            llama.n_tokens = context
        return statistics.median(times)


ENGINES = (Transformers, Continuous, Llama)


def check(name: str, made: Sequence[int], wanted: Sequence[int]) -> None:
    """A peer that stops early would look fast: refuse its figure."""
    if list(made) != list(wanted):
        raise UnsupportedError(f"{name} made {list(made)} tokens where {list(wanted)} were asked for")


def _need(module: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package or module, "peers") from error
