"""The vocabulary of the engine: what a method proposes, what a forward gives back, what a method commits.

    propose   a method says which rows of each of its sequences it wants evaluated     -> Step
    pack      the rows of all sequences, of all methods, become one flat batch
    forward   one pass of the model                                                    -> Outcome
    commit    the method says which tokens are final and which rows' K/V stays         -> Commit
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from stretto.engine.cache import View
    from stretto.engine.host import Host
    from stretto.engine.params import SamplingParams
    from stretto.engine.sampling import Sampler
    from stretto.engine.team import Team
    from stretto.models.entries import Entry

__all__ = ["CAUSAL", "FULL", "Commit", "Extra", "Lease", "Method", "Metrics", "Outcome", "Sequence", "Step", "Visible"]

CAUSAL = "causal"  # a row of the step sees the rows before it, and itself
FULL = "full"  # every row of the step sees every row of the step


class Visible:
    """Who sees whom among the rows of a step, prepared for many steps: the columns that each row sees, row after row,
    and where each row's begin (int32 [n + 1])."""

    __slots__ = ("columns", "counts", "ptr")

    def __init__(self, matrix: np.ndarray):
        """``matrix`` bool [n, n]: row i sees row j."""
        self.columns = np.nonzero(matrix)[1].astype(np.int32)
        self.counts = matrix.sum(1).astype(np.int32)
        self.ptr = np.concatenate([[0], self.counts.cumsum()]).astype(np.int32)


@dataclass(slots=True)
class Step:
    """The rows that one sequence wants evaluated in the next forward (n rows).

    Every row sees ``context`` (ranges of cached rows; None = all) and, among the rows of this step, what ``see``
    says: CAUSAL, FULL, a list ``parent[i] < i`` (-1 = none; a row sees its ancestors and itself), or a boolean
    matrix [n, n] with ``see[i, j]`` = row i sees row j (as ``Visible`` where many steps share it).
    ``positions`` default to consecutive ones behind the cached rows.
    ``logits``: rows whose logits are wanted (None = all). ``embeds`` [len(embed_rows), H] replaces the token
    embeddings of ``embed_rows``. ``entries``: rows that enter in mid-stack. ``taps``: layers whose output states are
    wanted (0 = embeddings, -1 = final). ``sharing``: a rule (``models.moe.Rule``) and groups of rows that each route
    within one small set of experts; such forwards run in torch.
    ``early`` = (layer, call): ``call(outcome)`` gets the logits as that layer (1-based, below the last) would give
    them, while the layers above it are still to run; it must return at once.
    ``sure``: whether ``Outcome.sure`` will be asked for; the forward may then compute it.
    ``extra``: whatever the method wants to find again at commit; the engine never looks at it.
    """

    tokens: Seq[int]
    positions: Seq[int] | np.ndarray | None = None
    see: str | Seq[int] | np.ndarray | Visible = CAUSAL
    context: Seq[tuple[int, int]] | None = None
    logits: Seq[int] | None = None
    embeds: Tensor | None = None
    embed_rows: Seq[int] = ()
    taps: Seq[int] = ()
    entries: Seq[Entry] = ()
    early: tuple[int, Callable[[Outcome], None]] | None = None
    sharing: tuple[Any, Seq[Seq[int]]] | None = None
    sure: bool = False
    extra: Any = None

    def __len__(self) -> int:
        return len(self.tokens)


class Outcome:
    """What the forward gave to one step. Rows are those of ``Step.logits``, in that order."""

    __slots__ = ("_argmax", "_hidden", "_logits", "_rows", "_sure", "start", "stop")

    def __init__(
        self, logits: Tensor, argmax: np.ndarray, start: int, stop: int,
        hidden: dict[int, Tensor], rows: slice, sure: np.ndarray | None = None,
    ):
        self._logits, self._argmax, self._hidden, self._rows, self._sure = logits, argmax, hidden, rows, sure
        self.start, self.stop = start, stop

    @property
    def logits(self) -> Tensor:
        """float32 [rows asked for, V]."""
        return self._logits[self.start : self.stop]

    @property
    def argmax(self) -> np.ndarray:
        """int64 [rows asked for]; the lowest id wins ties."""
        return self._argmax[self.start : self.stop]

    @property
    def sure(self) -> np.ndarray:
        """float32 [rows asked for]: the probability of each row's likeliest token."""
        if self._sure is None:
            return torch.softmax(self.logits, -1).amax(-1).cpu().numpy()
        return self._sure[self.start : self.stop]

    def hidden(self, layer: int) -> Tensor:
        """float32 [n, H]: the states of all rows of the step after ``layer`` (must have been tapped)."""
        return self._hidden[layer][self._rows]


@dataclass(slots=True)
class Commit:
    """What a step made final.

    ``tokens`` are appended to the sequence, in order. ``keep`` are the rows of the step whose K/V stays, in logical
    order, appended to the view (the others vanish). Before that, ``truncate`` cuts the view back to a length and
    ``replace`` = (start, rows) puts rows in the place of cached ones.
    ``finished``: the method itself ends the sequence ("stop"); the engine finds stop tokens, stop strings and
    max_tokens inside ``tokens`` by itself and cuts there.
    ``logprob_rows``: for each token the row (in the order of Step.logits) whose law decided it; None = no logprobs.
    ``logprobs``: instead of that, {id: log-probability} for each token, where an earlier forward decided some.
    ``step_map``: for each token, the 0-based forward of this sequence that decided it; None = this one.
    """

    tokens: Seq[int] = ()
    keep: Seq[int] | range = ()
    truncate: int | None = None
    replace: tuple[int, Seq[int]] | None = None
    finished: str | None = None
    drafted: int = 0
    accepted: int = 0
    logprob_rows: Seq[int] | None = None
    logprobs: Seq[dict[int, float]] | None = None
    step_map: Seq[int] | None = None


@dataclass(slots=True)
class Metrics:
    """What one sequence cost. ``forwards`` counts the forwards that its method took part in; a chunk of the prompt
    that a forward evaluates without the method counts in ``prefill_forwards``."""

    forwards: int = 0
    prefill_forwards: int = 0
    rows: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    ttft: float = 0.0
    started: float | None = None  # time.perf_counter() when it first left the queue
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    def note(self, text: str) -> None:
        """Say something once: why a method was switched off, what was clipped."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(slots=True, frozen=True)
class Lease:
    """Cached rows that the caller lends to a sequence and has back, longer, when it ends.

    ``view``: rows of the first tokens of the prompt. ``shift``: position of a row minus its place in the view, for
    rows to come. ``path``: branch path, a part of the key of the random numbers. ``plain``, ``reads``, ``team``: as in
    Sequence. ``behind``: the sequence (a stream's) that evaluates the beginning of the prompt now; the rows are lent to
    this one when it has done so, in the same forward where the method allows it (``Method.rides``).
    """

    view: View
    shift: int = 0
    path: tuple[int, ...] = ()
    plain: bool = True
    reads: tuple[View, ...] = ()
    team: Team | None = None
    behind: Sequence | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of tokens: the prompt and what was made final, and what of it is cached."""

    id: int
    tokens: list[int]  # prompt + final tokens; the engine appends
    prompt_len: int
    params: SamplingParams
    method: Method
    view: View
    sampler: Sampler
    choice: int = 0
    salt: str = ""
    taps: tuple[int, ...] = ()  # layers whose states are kept by slot: at first the method's; it may change them
    computed: int = 0  # rows that will be cached when the method's rows run; the engine writes it before propose
    row_limit: int = 1 << 30  # most rows the method may propose now; the engine writes it
    shift: int = 0  # what is added to every position that the method asks for; not 0 behind a join
    held: bool = False  # the view is lent by a session: it outlives the sequence and is never dropped
    plain: bool = True  # the cached rows are those of a plain prefill of ``tokens``; only such are shared
    reads: tuple[View, ...] = ()  # what its rows see before its own view, in this order, as it is at each forward
    team: Team | None = None  # goes forward together with these; only methods whose rows all stay (engine/team.py)
    state: Any = None  # the method's own
    metrics: Metrics = field(default_factory=Metrics)
    logprobs: list[dict[int, float]] | None = None
    step_map: list[int] = field(default_factory=list)  # forward number that decided each generated token

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def prefix_salt(self) -> str:
        """What separates cached prefixes: the tenant's salt, and the states that the rows must have."""
        return f"{self.salt}\0{self.taps}" if self.taps else self.salt

    @property
    def remaining(self) -> int:
        """How many tokens max_tokens still allows; at least 1 while the sequence runs."""
        return self.params.max_tokens - self.generated


@dataclass(frozen=True, slots=True)
class Extra:
    """What a method brings beside the model; it may say so in an attribute ``extra``. ``bytes``: of weights;
    ``bytes_per_token``: of every cached token; ``training_minutes``: None where they are not known."""

    parameters: int = 0
    bytes: int = 0
    bytes_per_token: int = 0
    training_minutes: float | None = None


class Method(Protocol):
    """A decoding method: a pair of functions around the forward, and nothing else.

    One instance serves all sequences of an engine that use the same options. ``propose`` may be called again
    for the same state (a step that found no room is dropped and asked for anew), so it must not change the law of
    the output. The first rows of a sequence (its prompt) are evaluated by the engine as ``prefill`` says.

    A method that reads hidden states of cached rows, the prompt's included, has an attribute ``taps``: the layers
    (0 = embeddings, -1 = final-normed) whose states the engine keeps for every row of the method's sequences, in
    ``Host.states(layer)`` under the row's slot. So they follow the cache through chunked prefill, truncation,
    compaction and forks, and come back with the rows after a preemption. A cached prefix is shared among sequences
    with the same taps only. A method may set ``Sequence.taps`` to () while it needs no states and nobody else does
    (``Host.taps``): rows of such forwards have none, which ``Host.written`` says. The rows of a step have theirs
    after its forward; those that lead it have none at propose.

    A method whose step is a plain chain and that looks at nothing but ``Sequence.tokens`` when it proposes may say so
    in an attribute ``rides`` = True: its rows may then share a forward with the rows of another sequence that evaluates
    the beginning of its text (threads forked from a line that is not cached yet).
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]

    def __init__(self, host: Host, options: Any): ...

    def admit(self, seq: Sequence) -> None:
        """Refuse what the method cannot serve (UnsupportedError), set ``seq.state``."""

    def prefill(self, seq: Sequence) -> int:
        """How many leading tokens the engine must have cached before the method's own rows."""
        ...

    def propose(self, seqs: list[Sequence]) -> list[Step]: ...

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]: ...

    def release(self, seq: Sequence) -> None:
        """The sequence ended, for whatever reason: free what belongs to it."""

    def preemptible(self, seq: Sequence) -> bool:
        """Whether dropping the K/V now and computing it again changes nothing."""
        ...


def take_argmax(logits: Tensor) -> np.ndarray:
    """int64 [k]: the lowest id among the largest logits of each row."""
    return torch.argmax(logits, dim=-1).numpy() if len(logits) else np.empty(0, np.int64)
