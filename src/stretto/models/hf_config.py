"""``config.json`` and ``ModelConfig``, both ways.

Source of the keys: the published config files of each family; defaults are those of transformers 5.
A ``stretto`` section may say more: ``attention``, ``block_size``, ``shift``, ``mask_token_id``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.errors import ArchitectureError
from stretto.models.config import ModelConfig, MoEConfig, RopeConfig
from stretto.models.families import family_of

__all__ = ["read", "write"]


def read(data: Mapping[str, Any]) -> ModelConfig:
    """The model that a ``config.json`` describes; ArchitectureError for what is not covered."""
    return _Reader(data).config()


def write(c: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model: the source file's keys where they still hold, else fresh
    ones.
    """
    if not c.source:
        return _fresh(c)
    return dict(c.source) if read(c.source) == c else _patched(c)


class _Reader:
    """Reads one config.json with the keys and defaults of its family."""

    def __init__(self, data: Mapping[str, Any]):
        self.data = data
        if data.get("quantization_config"):
            method = data["quantization_config"].get("quant_method", "unknown")
            raise ArchitectureError(
                f"quantized checkpoints ({method}) are not supported: load the unquantized model"
            )
        self.model_type, self.family = family_of(data)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of canonical ``name``, under any of the keys that the family uses for it."""
        for key in (*self.family.keys.get(name, ()), name):
            if self.data.get(key) is not None:
                return self.data[key]
        return self.family.defaults.get(name, default)

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            keys = " or ".join((*self.family.keys.get(name, ()), name))
            raise ArchitectureError(f"config.json of model_type {self.model_type!r} lacks {keys}")
        return value

    def number(self, name: str, default: float | None = None, kind: type = int) -> Any:
        """The value of canonical ``name`` as an int (or ``kind``); it must exist unless there is a
        default.
        """
        value = self.get(name, default) if default is not None else self.need(name)
        try:
            return kind(value)
        except (TypeError, ValueError) as e:
            raise ArchitectureError(f"{name}={value!r} in config.json is not a number") from e

    def config(self) -> ModelConfig:
        self._refuse()
        family, extra = self.family, self.data.get("stretto") or {}
        hidden, heads = self.number("hidden_size"), self.number("num_attention_heads")
        layers = self.number("num_hidden_layers")
        eos = self.data.get("eos_token_id")
        return ModelConfig(
            model_type=self.model_type,
            vocab_size=self.number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self._intermediate(hidden),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self.number("num_key_value_heads", heads),
            head_dim=self.number("head_dim", hidden // max(heads, 1)),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6, float),
            max_position_embeddings=self.number("max_position_embeddings", 2048),
            tie_word_embeddings=bool(self.get("tie_word_embeddings", False)),
            rope=self._rope(),
            qkv_bias=self._flag(family.qkv_bias),
            o_bias=self._flag(family.o_bias),
            mlp_bias=self._flag(family.mlp_bias),
            qk_norm=self._flag(family.qk_norm),
            windows=self._windows(layers),
            moe=self._moe(layers),
            attention=extra.get("attention", family.attention),
            block_size=int(
                extra.get("block_size", self.data.get("block_size") or family.block_size)
            ),
            shift=bool(extra.get("shift", family.shift)),
            bos_token_id=self.data.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            pad_token_id=self.data.get("pad_token_id"),
            mask_token_id=extra.get("mask_token_id", self.get("mask_token_id")),
            dtype=self.data.get("dtype") or self.data.get("torch_dtype"),
            source=dict(self.data),
        )

    def _refuse(self) -> None:
        act = self.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise ArchitectureError(f"hidden_act={act!r} is not supported: only silu")
        for key, value in self.family.fixed.items():
            if self.data.get(key, value) not in (value, None):
                raise ArchitectureError(
                    f"{key}={self.data[key]!r} is not supported for {self.model_type}: "
                    f"only {value!r}"
                )

    def _flag(self, rule: bool | str) -> bool:
        """A family's flag is fixed, or the name of the key that holds it."""
        if not isinstance(rule, str):
            return rule
        value = self.data.get(rule)
        return bool(self.family.defaults.get(rule, False) if value is None else value)

    def _intermediate(self, hidden: int) -> int:
        value = self.get("intermediate_size")
        if value is None and self.data.get("mlp_ratio"):
            value = self.data["mlp_ratio"] * hidden
        return int(value) if value is not None else self.number("intermediate_size")

    def _rope(self) -> RopeConfig:
        new = self.data.get("rope_parameters")
        old = self.data.get("rope_scaling")
        params = dict(new or old or {})
        kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
        params.pop("type", None)
        theta = params.pop("rope_theta", None) or self.get("rope_theta", 10000.0)
        partial = params.pop("partial_rotary_factor", None) or self.get("partial_rotary_factor", 1.0)
        if float(partial) != 1.0 and not self.family.rope_partial:
            raise ArchitectureError(
                f"partial_rotary_factor={partial} is not supported for {self.model_type}: only 1"
            )
        return RopeConfig(kind, float(theta), params, self.family.rope_fp32, float(partial))

    def _windows(self, layers: int) -> tuple[int | None, ...]:
        rule, size = self.family.window, self.data.get("sliding_window")
        if rule == "always":
            size = self.data.get("sliding_window", 4096)
            return (size,) * layers
        if rule == "layers" and size is not None and self.data.get("use_sliding_window"):
            types = self.data.get("layer_types")
            if types is None:
                first = self.data.get("max_window_layers", 28)
                types = ["sliding_attention" if i >= first else "full" for i in range(layers)]
            return tuple(size if t == "sliding_attention" else None for t in types)
        return (None,) * layers

    def _moe(self, layers: int) -> MoEConfig | None:
        rule = self.family.moe
        if rule is None:
            return None
        dense = set(self.data.get("mlp_only_layers") or ())
        step = int(self.data.get("decoder_sparse_step") or 1)
        freq = self.data.get("moe_layer_freq")
        sparse = tuple(
            bool(freq[i]) if isinstance(freq, list) else i not in dense and (i + 1) % step == 0
            for i in range(layers)
        )
        if rule == "bailing":
            first = int(self.data.get("first_k_dense_replace") or 0)
            sparse = tuple(i >= first for i in range(layers))
        return MoEConfig(
            experts=self.number("num_experts"),
            top_k=self.number("num_experts_per_tok"),
            intermediate_size=self.number("moe_intermediate_size"),
            renormalize=True if rule == "mixtral" else bool(self.get("norm_topk_prob", False)),
            cast=rule == "qwen",
            sparse=sparse,
            **(self._groups() if rule == "bailing" else {}),
        )

    def _groups(self) -> dict[str, Any]:
        """What a router with biases, groups and shared experts has beyond the common facts."""
        shared = int(self.get("num_shared_experts") or 0)
        groups = int(self.get("n_group") or 1)
        return dict(
            score=self.get("score"),
            expert_bias=bool(self.get("expert_bias")),
            groups=groups,
            top_groups=int(self.get("topk_group") or groups),
            scale=float(self.get("routed_scaling_factor") or 1.0),
            shared=shared * int(self.get("shared_size") or self.get("moe_intermediate_size")),
        )


def _rope_hf(c: ModelConfig) -> dict[str, Any]:
    out = {"rope_type": c.rope.type, "rope_theta": c.rope.theta, **c.rope.params}
    return out if c.rope.partial == 1.0 else {**out, "partial_rotary_factor": c.rope.partial}


def _stretto_section(c: ModelConfig) -> dict[str, Any]:
    out: dict[str, Any] = {}
    family = c.family
    if (c.attention, c.block_size, c.shift) != (family.attention, family.block_size, family.shift):
        out = {"attention": c.attention, "block_size": c.block_size, "shift": c.shift}
    if c.mask_token_id is not None and c.mask_token_id != family.defaults.get("mask_token_id"):
        out["mask_token_id"] = c.mask_token_id
    return out


def _fresh(c: ModelConfig) -> dict[str, Any]:
    """Every key from scratch, in the family's own words."""
    family = c.family
    plain = {
        k: getattr(c, k)
        for k in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "max_position_embeddings",
            "tie_word_embeddings",
        )
    }
    out: dict[str, Any] = {"model_type": family.model_type or c.model_type}
    out["architectures"] = [family.architecture]
    out |= {(family.keys.get(k) or (k,))[0]: v for k, v in plain.items()}
    out["hidden_act"] = "silu"
    for rule, value in (
        (family.qkv_bias, c.qkv_bias),
        (family.mlp_bias, c.mlp_bias),
        (family.qk_norm, c.qk_norm),
    ):
        if isinstance(rule, str):
            out[rule] = value
    if family.rope_style == "old":
        out |= {"rope_theta": c.rope.theta}
        if c.rope.partial != 1.0:
            out["partial_rotary_factor"] = c.rope.partial
    else:
        out["rope_parameters"] = _rope_hf(c)
    out |= _window_keys(c) | _moe_keys(c)
    for what in ("bos", "pad", "mask"):
        token = getattr(c, f"{what}_token_id")
        if token is not None:
            out[f"{what}_token_id"] = token
    eos = list(c.eos_token_ids)
    out["eos_token_id"] = (eos[0] if len(eos) == 1 else eos) if eos else None
    out["dtype"] = c.dtype or "float32"
    section = _stretto_section(c)
    return out | ({"stretto": section} if section else {})


def _window_keys(c: ModelConfig) -> dict[str, Any]:
    sizes = {w for w in c.windows if w is not None}
    if c.family.window == "always":
        return {"sliding_window": c.windows[0]}
    if not sizes:
        return {}
    types = ["full_attention" if w is None else "sliding_attention" for w in c.windows]
    return {
        "use_sliding_window": True,
        "sliding_window": sizes.pop(),
        "layer_types": types,
        "max_window_layers": types.index("sliding_attention"),
    }


def _moe_keys(c: ModelConfig) -> dict[str, Any]:
    if c.moe is None:
        return {}
    keys = c.family.keys
    out = {
        keys.get("num_experts", ("num_experts",))[0]: c.moe.experts,
        "num_experts_per_tok": c.moe.top_k,
        keys.get("moe_intermediate_size", ("moe_intermediate_size",))[0]: c.moe.intermediate_size,
    }
    if c.family.moe == "bailing":
        return out | _bailing_keys(c.moe)
    if c.family.moe != "mixtral":
        out["norm_topk_prob"] = c.moe.renormalize
        out["mlp_only_layers"] = [i for i, s in enumerate(c.moe.sparse) if not s]
        out["decoder_sparse_step"] = 1
    return out


def _bailing_keys(m: MoEConfig) -> dict[str, Any]:
    return {
        "norm_topk_prob": m.renormalize,
        "first_k_dense_replace": m.sparse.index(True) if any(m.sparse) else len(m.sparse),
        "score_function": m.score,
        "moe_router_enable_expert_bias": m.expert_bias,
        "n_group": m.groups,
        "topk_group": m.top_groups,
        "routed_scaling_factor": m.scale,
        "num_shared_experts": int(m.shared > 0),
        "moe_shared_expert_intermediate_size": m.shared or m.intermediate_size,
    }


def _patched(c: ModelConfig) -> dict[str, Any]:
    """The source file with the keys of the changed fields replaced by fresh ones."""
    was, fresh = read(c.source), _fresh(c)
    out = dict(c.source)
    old_fresh = _fresh(was)
    for key in fresh.keys() | old_fresh.keys():
        if fresh.get(key) != old_fresh.get(key):
            if key == "stretto":
                out[key] = {**out.get(key, {}), **fresh.get(key, {})}
            elif key in fresh:
                out[key] = fresh[key]
            else:
                out.pop(key, None)
    return out
