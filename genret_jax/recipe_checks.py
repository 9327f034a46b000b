"""Types and ranges of the fields of a recipe: what gin lets through."""

from __future__ import annotations

import dataclasses
from typing import Any

from genret_jax.decoding import NORMALISERS
from genret_jax.errors import UserError
from genret_jax.modeling.layers import FEED_FORWARD

# Fields that are shares, and fields that count something and may be 0.
_SHARES = (
    "dropout_rate",
    "title_share",
    "frame_share",
    "word_dropout",
    "pseudo_share",
    "held_out",
    "held_out_documents",
    "unseen_share",
    "label_smoothing",
    "share",
)
_MAY_BE_ZERO = (
    "seed",
    "warmup_steps",
    "input_length",
    "dev_queries",
    "prefix_negatives",
    "retrieved_negatives",
    "refresh_every",
    "queries",
    "chunk",
    "rows",
    "adaptor_rank",
)
_LEAST = {"document_length": 4, "relative_buckets": 4}
_POSITIVE = ("temperature", "learning_rate", "layer_norm_epsilon")
_NOT_NEGATIVE = (
    "generation",
    "prefix",
    "retrieval",
    "rank",
    "margin",
    "drawn_margin",
    "anchor",
    "weight_decay",
    "clip_norm",
    "z_loss",
    "r_drop",
)
# Fields that name one of a few.
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "start": ("random", "lexical", "pretrained"),
    "feed_forward": tuple(FEED_FORWARD),
    "vector": ("decoder_first", "decoder_mean", "encoder_mean"),
    "similarity": ("cosine", "dot"),
    "source": ("model", "bm25"),
    "normaliser": NORMALISERS,
    "store": ("float32", "bfloat16", "int8"),
}


def check_part(part: Any) -> None:
    """Types and ranges of a part of a recipe: what gin lets through.

    Raises:
      UserError: naming the field, what it is, and what it must be.
    """
    for field in dataclasses.fields(part):
        value, default = getattr(part, field.name), _default(field)
        wanted: Any = (int, float) if isinstance(default, float) else type(default)
        problem = ""
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            problem = f"a {type(default).__name__}"
        elif field.name in _SHARES and not 0 <= value < 1:
            problem = "at least 0 and below 1"
        elif isinstance(default, int) and not isinstance(default, bool):
            least = 0 if field.name in _MAY_BE_ZERO else _LEAST.get(field.name, 1)
            problem = f"at least {least}" if value < least else ""
        elif field.name in _POSITIVE and not 0 < value < float("inf"):
            problem = "above 0"
        elif field.name in _NOT_NEGATIVE and not 0 <= value < float("inf"):
            problem = "at least 0"
        elif field.name == "prefix_depth" and not _is_depth(value):
            problem = "'deepest', 'sampled' or a number from '1' up"
        elif field.name == "indexing_share" and value > 1:
            problem = "at most 1"
        elif field.name in _CHOICES and value not in _CHOICES[field.name]:
            problem = f"one of {', '.join(map(repr, _CHOICES[field.name]))}"
        if problem:
            raise UserError(
                f"{type(part).__name__}.{field.name} is {value!r}, but must be {problem}"
            )


def _is_depth(value: str) -> bool:
    return value in ("deepest", "sampled") or (value.isdecimal() and int(value) > 0)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
