"""The recipes of the zoo: shape, objective and budget of every model and part. Importing this imports no torch.

Shapes are qwen3's (normed queries and keys, no biases, tied embeddings). The diffusion models and the mixture of
experts start from ``tiny``, as SDAR, Fast-dLLM v2 and sparse upcycling (Komatsuzaki et al., 2023) start from a trained
autoregressive model. Budgets are for two CPU cores. A part (``PartRecipe``) is trained on a frozen model of the zoo
and ships as an adapter (``training/parts.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stretto.errors import UnknownNameError

if TYPE_CHECKING:
    from stretto.training.trainer import Record

__all__ = [
    "RECIPES", "DistillRecipe", "FilterRecipe", "PartRecipe", "RLRecipe", "Recipe", "ThreadsRecipe", "find_recipe",
    "run_recipe",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one model of the zoo is made."""

    name: str
    purpose: str
    objective: Literal[
        "ar", "masked_diffusion", "block_diffusion", "jacobi_forcing", "tool_slots", "causal_recovery",
        "structured_attention", "workers", "worked_steps",
    ] = "ar"
    pages: Literal["workbook", "orchestra"] = "workbook"  # what plain next-token training reads
    base: str | None = None  # model whose weights it starts from
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 512
    experts: int = 0  # 0 = dense
    top_k: int = 2
    sparse_every: int = 1  # every so many-th layer, from the last back, is routed; the others are dense
    dense_ffn: int = 512  # of the dense layers of a mixture of experts; ``ffn`` is then of an expert
    balance: float = 0.01  # weight of the load-balance loss (Switch)
    block_size: int = 8  # of block diffusion and causal recovery
    suffix: float = 0.0  # share of the blocks (causal recovery) or answers (masked diffusion) hidden from a place on
    trajectories: tuple[int, ...] = ()  # jacobi forcing: n, tokens of a recorded block, for equal shares of the budget
    examples: int = 1024  # jacobi forcing: of a pool of trajectories
    window: int = 4  # jacobi forcing: w, noisy blocks that see each other
    schedule: str = "progressive"  # jacobi forcing: of the noise over the blocks of a window
    ar_weight: float = 10.0  # jacobi forcing: of the clean answers' cross-entropy
    minutes: float = 50.0
    rows: int = 12  # rows of a batch
    length: int = 144  # tokens of a row
    lr: float = 3e-3
    adam_lr: float = 2e-3
    warmup: int = 50  # steps
    decay: float = 0.45  # last share of the budget, over which the rate falls to zero
    average: float = 0.995  # decay of the averaged weights, which ship
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=lambda: dict(_MIX))  # task -> share of the training mix

    @property
    def model(self) -> str:
        """The name of the model in the zoo."""
        return self.name.removeprefix("zoo-")

    @property
    def causal(self) -> bool:
        return self.objective not in ("masked_diffusion", "block_diffusion")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecipe:
    """How one extra part of a frozen model is made. ``kind``: a key of ``training.parts.KINDS``; ``options``: what
    that kind is built with."""

    name: str
    purpose: str
    kind: str
    base: str = "zoo:tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    own_answers: float = 0.75  # share of the examples whose answers are the base's own greedy ones
    minutes: float = 8.0
    rows: int = 12  # rows of a batch
    length: int = 144  # tokens of a row
    lr: float = 4e-3  # of Muon, where the kind has layers
    adam_lr: float = 4e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 50  # steps
    decay: float = 0.6  # last share of the budget, over which the rate falls to zero
    average: float = 0.99  # decay of the averaged weights, which ship
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)  # task -> share of the mix; all alike

    @property
    def model(self) -> str:
        """The name of the part in the zoo."""
        return self.name.removeprefix("zoo-")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillRecipe:
    """How a diffusion model's LoRA adapter is distilled from its own right answers (``training/self_distill.py``).
    ``options``: of the objective (``training/distill.py``)."""

    name: str
    purpose: str
    objective: Literal["certainty", "dscd", "sft"]
    base: str = "zoo:tiny-blocks"
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 8
    alpha: float = 16.0
    minutes: float = 5.0
    rows: int = 8  # rows of a batch
    length: int = 160  # tokens of a row
    epochs: int = 4  # passes over every pool of own answers, with other noise (paper: 3 to 6)
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 5  # steps
    decay: float = 0.5  # last share of the budget, over which the rate falls to zero
    average: float = 0.95  # decay of the averaged weights, which ship
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)  # task -> share of the mix; all alike

    @property
    def model(self) -> str:
        """The name of the adapter in the zoo."""
        return self.name.removeprefix("zoo-")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterRecipe:
    """How the filter of Learn2PD is made for a diffusion model (``training/learn2pd.py``). ``budget``: share of
    accepted predictions that may change later, on ``held_out`` prompts."""

    name: str
    purpose: str
    base: str
    inputs: tuple[str, ...] = ("odds",)  # the paper: confidence
    hidden: int = 32
    prompts: int = 160
    held_out: int = 64
    epochs: int = 1200
    lr: float = 3e-3
    budget: float = 0.002
    minutes: float = 1.0  # what it takes; the work is fixed
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)  # task -> share of the mix; all alike

    @property
    def model(self) -> str:
        """The name of the part in the zoo."""
        return self.name.removeprefix("zoo-")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsRecipe:
    """How a model that reasons in threads is made (``training/threads_run.py``). ``stages``: of sft, self and rl;
    ``minutes``: of sft and self each; ``rl_minutes``, ``prompts``, ``rl_lr``, ``normalise``: of P-GRPO."""

    name: str
    purpose: str
    base: str = "zoo:tiny"
    stages: tuple[str, ...] = ("sft",)
    minutes: float = 24.0
    rows: int = 9  # examples of a batch
    length: int = 512  # places of a row of the policy's pack
    lr: float = 1.6e-3
    adam_lr: float = 1.2e-3
    warmup: int = 30  # steps
    decay: float = 0.6  # last share of the budget, over which the rate falls to zero
    average: float = 0.99  # decay of the averaged weights, which ship
    rl_minutes: float = 5.0
    prompts: int = 8  # of a step; 8 answers each
    max_tokens: int = 400  # of an answer of the model's own
    rl_lr: float = 1e-4
    normalise: Literal["mean", "std"] = "mean"
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The name of the model in the zoo."""
        return self.name.removeprefix("zoo-")


@dataclass(frozen=True, slots=True, kw_only=True)
class RLRecipe:
    """How a block diffusion model is taught to be right in few forwards (``training/lightning_run.py``). ``options``:
    of ``lightning.Lightning``."""

    name: str
    purpose: str
    base: str = "zoo:tiny-blocks"
    tasks: tuple[str, ...] = ("math_gains", "list_sort", "json_call")
    options: Mapping[str, Any] = field(default_factory=dict)
    minutes: float = 40.0
    seed: int = 0

    @property
    def model(self) -> str:
        """The name of the model in the zoo."""
        return self.name.removeprefix("zoo-")


_MIX = {  # the tasks that are learnt late get a larger share
    "list_copy": 1.5, "list_reverse": 1, "list_sort": 1.5, "list_double": 1, "list_pairs": 0.6,
    "math_gains": 3, "math_price": 1.2, "math_boxes": 1.2, "json_call": 1, "json_batch": 0.4,
    "python_select": 0.4, "python_formula": 0.4, "python_total": 0.4, "python_guard": 0.4,
    "table_markdown": 0.6, "table_lookup": 4, "table_where": 5, "text_letter": 0.4,
    "text_notice": 0.2, "text_replace": 0.4,
}

_LATE = {  # what a distilled model forgets first
    "list_sort": 1.6, "list_pairs": 1.6, "math_gains": 1.6, "math_price": 1.6, "math_boxes": 1.6, "table_lookup": 1.6,
    "table_where": 1.6,
}

AnyRecipe = Recipe | PartRecipe | DistillRecipe | FilterRecipe | ThreadsRecipe | RLRecipe
_ALL: tuple[AnyRecipe, ...] = (
    Recipe(name="zoo-tiny", purpose="autoregressive, the target of every lossless method"),
    Recipe(
        name="zoo-tiny-draft", purpose="a small autoregressive draft for zoo:tiny",
        hidden=96, layers=2, heads=3, kv_heads=1, ffn=256, minutes=10,
    ),
    Recipe(
        name="zoo-tiny-blocks", purpose="block-causal masked diffusion (kind B), from zoo:tiny",
        objective="block_diffusion", base="zoo:tiny", minutes=60, lr=2e-3, adam_lr=1e-3,
    ),
    Recipe(
        name="zoo-tiny-diffusion", purpose="full-attention masked diffusion (kind F), from zoo:tiny-blocks",
        objective="masked_diffusion", base="zoo:tiny-blocks", suffix=0.5, minutes=40, length=192, rows=10, lr=2e-3,
        adam_lr=1e-3,
    ),
    Recipe(
        name="zoo-tiny-moe", purpose="mixture of experts, upcycled from zoo:tiny",
        base="zoo:tiny", experts=8, ffn=192, minutes=25, lr=2e-3, adam_lr=1e-3,
    ),
    Recipe(
        name="zoo-tiny-jacobi", purpose="fixes several tokens a forward: zoo:tiny, distilled on its own Jacobi states",
        objective="jacobi_forcing", base="zoo:tiny", trajectories=(8, 16), minutes=20, rows=4, length=256, lr=1.2e-3,
        adam_lr=6e-4, warmup=30, decay=0.6, weights=_LATE,
    ),
    Recipe(
        name="zoo-tiny-tools", purpose="fills all fields of a function call at once (SimpleTool), from zoo:tiny",
        objective="tool_slots", base="zoo:tiny", minutes=15, rows=8, length=288, lr=2e-3, adam_lr=2e-3, decay=0.6,
        weights={},
    ),
    Recipe(
        name="zoo-tiny-multiverse", purpose="writes independent parts of a solution in parallel, from zoo:tiny",
        objective="structured_attention", base="zoo:tiny", minutes=25, rows=3, length=640, lr=2e-3, adam_lr=2e-3,
        decay=0.6, weights={},
    ),
    ThreadsRecipe(
        name="zoo-tiny-threads", purpose="reasons in threads (ThreadWeaver), from zoo:tiny-multiverse",
        base="zoo:tiny-multiverse",
    ),
    Recipe(
        name="zoo-tiny-hogwild", purpose="works with others on one live cache (Hogwild), from zoo:tiny",
        objective="workers", base="zoo:tiny", minutes=18, rows=8, length=0, lr=2e-3, adam_lr=2e-3, decay=0.6,
        weights={},
    ),
    Recipe(
        name="zoo-tiny-steps", purpose="solves word problems of many steps, corrects slips (ATTS), from zoo:tiny",
        objective="worked_steps", base="zoo:tiny", minutes=10, rows=6, length=400, lr=3e-3, adam_lr=2e-3, warmup=20,
        decay=0.6, weights={},
    ),
    Recipe(
        name="zoo-tiny-steps-draft", purpose="the cheap half of zoo:tiny-steps, right less often, from zoo:tiny-draft",
        objective="worked_steps", base="zoo:tiny-draft", hidden=96, layers=2, heads=3, kv_heads=1, ffn=256, minutes=2,
        rows=6, length=400, lr=3e-3, adam_lr=3e-3, warmup=20, decay=0.6, weights={},
    ),
    Recipe(
        name="zoo-tiny-blocks-moe", purpose="block-causal masked diffusion, mixture of experts, from zoo:tiny-blocks",
        objective="block_diffusion", base="zoo:tiny-blocks", experts=16, top_k=4, ffn=128, sparse_every=2,
        minutes=10, lr=2e-3, adam_lr=1e-3,
    ),
    Recipe(
        name="zoo-tiny-wedlm", purpose="causal attention, next token and masked recovery, from zoo:tiny",
        objective="causal_recovery", base="zoo:tiny", block_size=16, suffix=0.5, minutes=60, lr=3e-3, adam_lr=1.5e-3,
    ),
    Recipe(
        name="zoo-tiny-agents", purpose="does one agent's part of a task of several (AdaptOrch), from zoo:tiny",
        pages="orchestra", base="zoo:tiny", minutes=24, rows=4, length=384, lr=3e-3, adam_lr=3e-3, warmup=30,
        decay=0.5, average=0.99, weights={},
    ),
    PartRecipe(
        name="zoo-tiny-medusa", purpose="Medusa heads for zoo:tiny", kind="medusa", options={"heads": 4}, minutes=5,
    ),
    PartRecipe(
        name="zoo-tiny-clover", purpose="Clover's chain of heads for zoo:tiny", kind="clover",
        options={"version": 1, "heads": 4, "augment": 1, "ffn": 64}, minutes=5,
    ),
    PartRecipe(
        name="zoo-tiny-clover2", purpose="Clover-2's chain of heads for zoo:tiny", kind="clover2",
        options={"version": 2, "heads": 5, "augment": 2, "ffn": 64}, minutes=5,
    ),
    PartRecipe(
        name="zoo-tiny-eagle", purpose="an EAGLE layer for zoo:tiny", kind="eagle",
        options={"version": 1, "depth": 5, "ffn": 256}, minutes=5,
    ),
    PartRecipe(
        name="zoo-tiny-eagle3", purpose="an EAGLE-3 layer for zoo:tiny", kind="eagle3",
        options={"version": 3, "depth": 5, "ffn": 256}, minutes=8,
    ),
    PartRecipe(
        name="zoo-tiny-ppd", purpose="prompt tokens for zoo:tiny", kind="ppd", options={"tokens": 4}, rows=6,
        adam_lr=5e-2, weight_decay=0.0, warmup=10, average=0.97,
    ),
    PartRecipe(
        name="zoo-tiny-draft-ppd", purpose="prompt tokens for zoo:tiny-draft", kind="ppd", base="zoo:tiny-draft",
        options={"tokens": 3}, rows=6, adam_lr=5e-2, weight_decay=0.0, warmup=10, average=0.97, minutes=4,
    ),
    PartRecipe(
        name="zoo-tiny-hidden-transfer", purpose="transfer matrices for zoo:tiny", kind="hidden_transfer",
        options={"entries": [2, 2, 2, 2]}, rows=6, lr=2e-2, weight_decay=0.0, warmup=10, average=0.97, minutes=20,
    ),
    DistillRecipe(
        name="zoo-tiny-dparallel", purpose="certain about many tokens at once (dParallel), from zoo:tiny-blocks",
        objective="certainty",
    ),
    DistillRecipe(
        name="zoo-tiny-cd4lm", purpose="safe on long jumps (CD4LM), from zoo:tiny-blocks", objective="dscd",
        options={"student": (0.5, 1.2), "positions": "truth"},
    ),
    DistillRecipe(
        name="zoo-tiny-own-sft", purpose="plain fine-tuning on own answers, the control of both", objective="sft",
    ),
    RLRecipe(
        name="zoo-tiny-lightningrl", purpose="right in few forwards (LightningRL), from zoo:tiny-blocks",
        options={"prompts_per_step": 8, "max_tokens": 48, "lr": 5e-5},
    ),
    FilterRecipe(
        name="zoo-tiny-blocks-filter", purpose="which predictions are final (Learn2PD), for zoo:tiny-blocks",
        base="zoo:tiny-blocks",
    ),
    FilterRecipe(
        name="zoo-tiny-diffusion-filter", purpose="which predictions are final (Learn2PD), for zoo:tiny-diffusion",
        base="zoo:tiny-diffusion",
    ),
)
RECIPES: dict[str, AnyRecipe] = {r.name: r for r in _ALL}


def find_recipe(name: str) -> AnyRecipe:
    """The recipe ``name``; its ``zoo-`` may be left out."""
    full = name if name.startswith("zoo-") else f"zoo-{name}"
    if full not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    return RECIPES[full]


def run_recipe(
    name: str, *, out: str | Path | None = None, minutes: float | None = None, steps: int | None = None,
    resume: bool = True, seed: int | None = None, threads: int | None = None, device: str = "auto",
    base: str | Path | None = None, changes: Mapping[str, Any] | None = None,
    report: Callable[[Record], None] | None = None,
) -> dict[str, Any]:
    """Train the model or part of recipe ``name`` and write it to ``out`` (default: a folder of the model's name, here).

    Checkpoints and the log lie in ``<out>.training``; ``resume`` continues from the newest one. ``minutes`` or
    ``steps`` replace the recipe's budget, ``base`` the model it starts from, ``changes`` any field of the recipe.
    ``report`` sees the record after every step; None draws a progress bar. Returns the record that is written to
    ``training.json``.
    """
    from stretto.training.learn2pd import run_filter
    from stretto.training.lightning_run import run_rl
    from stretto.training.parts import run_part
    from stretto.training.run import run
    from stretto.training.self_distill import run_distill
    from stretto.training.threads_run import run_threads

    recipe = replace(find_recipe(name), **dict(changes or {}))
    recipe = replace(recipe, seed=recipe.seed if seed is None else seed, base=str(base) if base else recipe.base)
    if minutes is None and steps is None and not isinstance(recipe, ThreadsRecipe):  # whose stages have budgets
        minutes = recipe.minutes
    makers: dict[type, Callable[..., dict[str, Any]]] = {
        Recipe: run, PartRecipe: run_part, DistillRecipe: run_distill,
        FilterRecipe: run_filter, ThreadsRecipe: run_threads, RLRecipe: run_rl,
    }
    return makers[type(recipe)](
        recipe, Path(out or recipe.model), minutes=minutes, steps=steps, resume=resume, threads=threads,
        device=device, report=report,
    )
