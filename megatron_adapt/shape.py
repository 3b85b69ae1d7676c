"""LlamaShape: the numbers of a Llama-family ``config.json``, read and checked once.

Reads the config dictionary of Hugging Face transformers 4 (``rope_theta`` + ``rope_scaling``) and 5
(``rope_parameters``). What the engine cannot reproduce exactly is refused by name, never ignored.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_adapt.errors import ConfigError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False},
}
"What transformers takes where a config is silent; a null counts as said."


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The "llama3" frequency scaling of rotary embeddings (Llama 3.1 model release)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Everything that decides the tensors and the arithmetic of a Llama model."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: RopeScaling | None
    tied: bool
    qkv_bias: bool = False
    "Whether queries, keys and values have a bias (Qwen2)."

    @property
    def num_parameters(self) -> int:
        """Number of parameters with the true (unpadded) vocabulary."""
        qkv = (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels * self.hidden_size
        out = self.num_attention_heads * self.kv_channels * self.hidden_size
        if self.qkv_bias:
            qkv += (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels
        layer = qkv + out + 3 * self.ffn_hidden_size * self.hidden_size + 2 * self.hidden_size
        matrices = 1 if self.tied else 2
        return self.num_layers * layer + self.hidden_size + matrices * self.vocab_size * self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; ``from_dict`` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaShape":
        """Rebuild a shape written by ``to_dict``."""
        scaling = values["rope_scaling"]
        return cls(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def pad_vocab_size(vocab_size: int, multiple: int) -> int:
    """Round ``vocab_size`` up to a multiple (rows of the padded matrices)."""
    return -(-vocab_size // multiple) * multiple


def read_shape(config: Mapping[str, Any], where: str) -> LlamaShape:
    """Read the shape out of a Hugging Face config dictionary.

    Args:
        config: content of ``config.json``.
        where: path of the file, for messages.

    Raises:
        ConfigError: a field is missing, or the model uses something the engine does not reproduce.
    """
    config = {**_DEFAULTS.get(str(config.get("model_type")), {}), **config}
    _refuse_unsupported(config, where)
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [name for name in names if name not in config]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing; this is not the config of a Llama model")
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise ConfigError(f"{where}: num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    rotary_base, scaling = _read_rope(config, where)
    return LlamaShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
        rotary_base=rotary_base,
        rope_scaling=scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=config["model_type"] == "qwen2",
    )


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("model_type")
    if kind not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"{where}: model_type {kind!r} is not supported; use one of {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    refused = {
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "sliding_window": config.get("use_sliding_window", True) and config.get("sliding_window"),
        "layer_types": sorted({*(config.get("layer_types") or ())} - {"full_attention"}),
        "hidden_act": None if config.get("hidden_act", "silu") == "silu" else config["hidden_act"],
    }
    for name, value in refused.items():
        if value:
            raise ConfigError(f"{where}: {name} {value!r} is not supported; the engine would compute something else")


def _read_rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    parameters = dict(config.get("rope_parameters") or {})
    scaling = dict(config.get("rope_scaling") or {})
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    values = {**scaling, **parameters}
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ConfigError(f"{where}: rope scaling of type {kind!r} is not supported; use 'default' or 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in values]
    if missing:
        raise ConfigError(f"{where}: llama3 rope scaling without {', '.join(missing)}; take the config from the model")
    return float(theta), RopeScaling(
        factor=float(values["factor"]),
        low_freq_factor=float(values["low_freq_factor"]),
        high_freq_factor=float(values["high_freq_factor"]),
        original_max_position_embeddings=int(values["original_max_position_embeddings"]),
    )
