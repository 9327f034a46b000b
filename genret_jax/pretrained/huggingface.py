"""What Hugging Face's T5 calls its sizes and tensors, and what they are called here.

T5's attention has one table of relative positions a side. There it is a tensor of the first block,
which the others share; here it is a parameter of the side. Matrices are [out, in] there and
[in, out] here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genret_jax.errors import UserError
from genret_jax.modeling.layers import FEED_FORWARD, T5Config

MODEL_TYPES = ("t5", "mt5")
# The embedding by its own name, or by the names of what shares it: some files hold only one.
EMBEDDINGS = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
)
OUTPUT = "lm_head.weight"
# Old checkpoints hold a table of positions for cross-attention, which T5 does not use.
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

_SIZES = {
    "embed_dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_encoder_layers": "num_layers",
}
_WITH_DEFAULTS = {
    "relative_buckets": ("relative_attention_num_buckets", 32),
    "relative_max_distance": ("relative_attention_max_distance", 128),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-6),
    "dropout_rate": ("dropout_rate", 0.1),
}
# Attention and its norm of each layer, in their order in a block.
_ATTENTIONS = {
    "encoder": (("attention", "SelfAttention", "pre_attention_layer_norm"),),
    "decoder": (
        ("self_attention", "SelfAttention", "pre_self_attention_layer_norm"),
        ("encoder_decoder_attention", "EncDecAttention", "pre_cross_attention_layer_norm"),
    ),
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def network_config(about: Mapping[str, Any], *, where: Path) -> T5Config:
    """The network that a config.json describes; with `tied_embeddings` as it says.

    Args:
      about: the parsed file.
      where: it stands, for messages.

    Raises:
      UserError: it is of another model, of a T5 that is not known here, or lacks a size.
    """
    model_type = about.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{where}: model_type is {model_type!r}, but only {' and '.join(MODEL_TYPES)} can be "
            "loaded (T5 1.0, T5 1.1, Flan-T5, mT5)"
        )
    feed_forward = about.get("feed_forward_proj", "gated-gelu" if model_type == "mt5" else "relu")
    if feed_forward not in FEED_FORWARD:
        raise UserError(
            f"{where}: feed_forward_proj is {feed_forward!r}, but must be one of "
            f"{', '.join(FEED_FORWARD)}"
        )
    try:
        sizes: dict[str, Any] = {ours: int(about[theirs]) for ours, theirs in _SIZES.items()}
        decoder = about.get("num_decoder_layers")
        rest = {name: about.get(key, value) for name, (key, value) in _WITH_DEFAULTS.items()}
        return T5Config(
            vocab_size=int(about["vocab_size"]),
            num_decoder_layers=sizes["num_encoder_layers"] if decoder is None else int(decoder),
            feed_forward=feed_forward,
            tied_embeddings=bool(about.get("tie_word_embeddings", True)),
            **sizes,
            **rest,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: no whole description of a T5 ({error!r})") from None


def scales_states(about: Mapping[str, Any]) -> bool:
    """Whether a config.json wants decoder states multiplied by embed^-1/2 before the output.

    Transformers 5 writes `scale_decoder_outputs`, and "tied" whatever the weights are; before, the
    first followed the second. It never scales in mT5.
    """
    if about.get("model_type") == "mt5":
        return False
    return bool(about.get("scale_decoder_outputs", about.get("tie_word_embeddings", True)))


def config_json(config: T5Config) -> dict[str, Any]:
    """The config.json of a network made here, for transformers 4 and 5 alike."""
    sizes = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    rest = {key: getattr(config, ours) for ours, (key, _) in _WITH_DEFAULTS.items()}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        **sizes,
        "num_decoder_layers": config.num_decoder_layers,
        **rest,
        "feed_forward_proj": config.feed_forward,
        "tie_word_embeddings": config.tied_embeddings,
        "scale_decoder_outputs": config.tied_embeddings,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def tensor_names(config: T5Config) -> dict[str, tuple[str, bool]]:
    """Our parameter -> (its tensor there, whether one is the other's transpose).

    Paths are joined by "/". What is not T5's (`log_temperature`) is not among them.
    """
    names = {"token_embedder/embedding": (EMBEDDINGS[0], False)}
    if not config.tied_embeddings:
        names["decoder/logits_dense/kernel"] = (OUTPUT, True)
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    gated = config.feed_forward.startswith("gated-")
    matrices = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
    for side, count in layers.items():
        names[f"{side}/relpos_bias/rel_embedding"] = (
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            True,
        )
        names[f"{side}/{side}_norm/scale"] = (f"{side}.final_layer_norm.weight", False)
        for n in range(count):
            ours, theirs = f"{side}/layers_{n}", f"{side}.block.{n}.layer"
            for place, (attention, name, norm) in enumerate(_ATTENTIONS[side]):
                for mine, yours in _PROJECTIONS.items():
                    names[f"{ours}/{attention}/{mine}/kernel"] = (
                        f"{theirs}.{place}.{name}.{yours}.weight",
                        True,
                    )
                names[f"{ours}/{norm}/scale"] = (f"{theirs}.{place}.layer_norm.weight", False)
            place = len(_ATTENTIONS[side])
            for matrix in matrices:
                names[f"{ours}/mlp/{matrix}/kernel"] = (
                    f"{theirs}.{place}.DenseReluDense.{matrix}.weight",
                    True,
                )
            norm = f"{theirs}.{place}.layer_norm.weight"
            names[f"{ours}/pre_mlp_layer_norm/scale"] = (norm, False)
    return names
