"""Which methods a bench measures on a model, and the loaded models they run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stretto.bench.measure import Arm
from stretto.decoding.registry import METHODS, get
from stretto.errors import OptionError, StrettoError, UnsupportedError
from stretto.zoo.models import MODELS, PREFIX

__all__ = ["ONE_BY_ONE", "Fleet", "named_methods", "open_llm"]

TWINS = {"zoo:tiny": ("zoo:tiny-diffusion", "zoo:tiny-blocks")}  # diffusion models trained on the same data
ONE_BY_ONE = "one-by-one"  # the baseline of a diffusion model: one token a forward


def open_llm(model: str, **engine: Any) -> Any:
    """An engine without prefix sharing: every run pays for its own prompt."""
    from stretto.llm import LLM

    return LLM(model, enable_prefix_caching=False, **engine)


def named_methods(given: str | Sequence[str]) -> list[str]:
    """The methods that the caller named, aliases resolved; none for "all" or nothing."""
    wanted = [given] if isinstance(given, str) else list(given)
    return [] if "all" in wanted else list(dict.fromkeys(get(n).name for n in wanted))


class Fleet:
    """The models of one bench, each loaded once, and the arms on them.

    ``methods``: names, or none for every method that runs on the model's kind of attention; plain decoding always
    comes first on a causal model. ``options``: method -> options. ``twins``: also diffusion models trained on
    the same data, by method ``diffusion``. ``skipped``: what was left out, and why.
    """

    def __init__(
        self, model: str, methods: str | Sequence[str] = (), *,
        options: Mapping[str, Mapping[str, Any]] | None = None, twins: bool = True, **engine: Any,
    ):
        self.model, self._engine, self._twins = str(model), engine, twins
        self.named = named_methods(methods)
        self._options = {get(k).name: dict(v) for k, v in (options or {}).items()}
        unmeasured = [k for k in self._options if self.named and k not in self.named]
        if unmeasured:
            raise OptionError("options", unmeasured[0], f"options of the named methods: {', '.join(self.named)}")
        self.skipped: list[dict[str, str]] = []
        self.llm = open_llm(self.model, **engine)

    @property
    def kind(self) -> str:
        return self.llm.config.attention

    def arms(self) -> list[Arm]:
        """The baseline first. A method that was not named and cannot run here is skipped; a named one raises."""
        out = [self._arm(self.llm, self.model, name) for name in self._names()]
        if self.kind != "causal":
            slow = {**self.options("diffusion"), "unmask": "fixed", "steps": None, "threshold": None}
            out.insert(0, Arm(self.llm, self.model, "diffusion", slow, ONE_BY_ONE))
        if self._with_twins:
            out += [self._twin(name) for name in TWINS[self.model]]
        return [arm for arm in out if arm is not None]

    def options(self, method: str) -> dict[str, Any]:
        """The caller's options; ``draft`` without a model gets the zoo's own."""
        given = dict(self._options.get(method, {}))
        known = MODELS.get(self.model.removeprefix(PREFIX)) if self.model.startswith(PREFIX) else None
        if method == "draft" and "model" not in given and known is not None and known.draft:
            given["model"] = PREFIX + known.draft
        return given

    @property
    def _with_twins(self) -> bool:
        return self._twins and self.model in TWINS and (not self.named or "diffusion" in self.named)

    def _names(self) -> list[str]:
        fitting = [m.name for m in METHODS.values() if self.kind in m.kinds]
        names = list(self.named) or fitting
        if self._with_twins and "diffusion" in names and "diffusion" not in fitting:
            names.remove("diffusion")
        for name in names:
            if name not in fitting:
                raise UnsupportedError(
                    f"method {name!r} does not run on a model with {self.kind} attention: use {', '.join(fitting)}"
                )
        return list(dict.fromkeys((["ar"] if self.kind == "causal" else []) + names))

    def _arm(self, llm: Any, model: str, name: str) -> Arm | None:
        options = self.options(name)
        try:
            llm.method(name, options)
        except StrettoError as error:
            if name in self.named or name in self._options or name == "ar":
                raise
            self.skip(model, name, error)
            return None
        return Arm(llm, model, name, options)

    def _twin(self, model: str) -> Arm | None:
        try:
            return self._arm(open_llm(model, **self._engine), model, "diffusion")
        except StrettoError as error:
            self.skip(model, "diffusion", error)
            return None

    def skip(self, model: str, method: str, error: Exception) -> None:
        """Leave a method out, saying why."""
        self.skipped.append({"model": model, "method": method, "reason": str(error)})
