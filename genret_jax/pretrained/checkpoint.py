"""A pretrained T5 as a folder: config.json, model.safetensors (or its parts), spiece.model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from genret_jax.errors import UserError
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.stacking import unstack_layers
from genret_jax.pretrained import huggingface
from genret_jax.pretrained.hub import CONFIG, TEXT_MODEL, find_folder
from genret_jax.pretrained.tensors import WEIGHTS, Tensors, open_tensors

log = logging.getLogger(__name__)
# Of a network, what its parameters fix, or what they were trained with; the rest may be chosen.
_FIXED = (
    "embed_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "num_encoder_layers",
    "num_decoder_layers",
    "tied_embeddings",
    "relative_buckets",
    "relative_max_distance",
    "feed_forward",
    "layer_norm_epsilon",
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A pretrained T5, its numbers not read yet.

    Attributes:
      folder: where it is.
      config: its network; `vocab_size` is what its embedding has rows, and `tied_embeddings` is
        what its tensors say.
      text_model: its SentencePiece model; None where the folder has none.
    """

    folder: Path
    config: T5Config
    text_model: Path | None
    _tensors: Tensors = dataclasses.field(repr=False)
    _scaled: bool = dataclasses.field(repr=False)

    def params(self) -> Any:
        """The parameter tree of `config`: float32, on the host.

        Where a checkpoint ties what it does not scale, or scales what it does not tie, the output
        matrix is a parameter of its own with the scale in it: the logits are the same.
        """
        flat = {}
        for ours, (theirs, transposed) in huggingface.tensor_names(self.config).items():
            value = self._tensors.read(_stored(theirs, self._tensors))
            if theirs == huggingface.OUTPUT and self._scaled:
                value *= self.config.embed_dim**-0.5
            flat[ours] = np.ascontiguousarray(value.T) if transposed else value
        return traverse_util.unflatten_dict(flat, sep="/")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of its files: whether a start is the one that a run began with."""
        digest = hashlib.sha256()
        text = [self.text_model] if self.text_model else []
        for path in (self.folder / CONFIG, *self._tensors.files, *text):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Opens a pretrained T5 and checks it without reading its numbers.

    Args:
      name: a folder, or a name on the hub; see `hub.find_folder`.

    Raises:
      UserError: it is not there, of another kind, or its tensors are not those of its
        configuration.
    """
    folder = find_folder(str(name))
    where = folder / CONFIG
    try:
        about = json.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no {CONFIG}; a pretrained T5 is a folder of {CONFIG}, {WEIGHTS} and "
            f"{TEXT_MODEL}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: not readable ({error}); fetch it again") from None
    if not isinstance(about, dict):
        raise UserError(f"{where}: not a JSON object; fetch it again")
    config, tensors = huggingface.network_config(about, where=where), open_tensors(folder)
    scaled = huggingface.scales_states(about)
    # Only tied *and* scaled is tied here; see `Checkpoint.params`.
    config = dataclasses.replace(config, tied_embeddings=scaled and _is_tied(config, tensors))
    _check(config, tensors, folder)
    text_model = folder / TEXT_MODEL
    return Checkpoint(folder, config, text_model if text_model.is_file() else None, tensors, scaled)


def decided(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of a recipe that a pretrained T5 leaves no choice in, and their values."""
    found = {f"NetworkConfig.{name}": getattr(checkpoint.config, name) for name in _FIXED}
    found["VocabularyConfig.rows"] = checkpoint.config.vocab_size
    if checkpoint.text_model:
        found["VocabularyConfig.model"] = str(checkpoint.text_model)
    return found


def _is_tied(config: T5Config, tensors: Tensors) -> bool:
    """Whether input and output share the embedding: as transformers 5 has it, by the tensors."""
    if huggingface.OUTPUT not in tensors.names:
        return True
    own = any(name in tensors.names for name in huggingface.EMBEDDINGS)
    if not config.tied_embeddings:
        return not own
    embedding = _stored(huggingface.EMBEDDINGS[0], tensors)
    return not own or np.array_equal(tensors.read(huggingface.OUTPUT), tensors.read(embedding))


def _stored(name: str, tensors: Tensors) -> str:
    """The name under which a tensor, or the one that it shares its numbers with, is stored."""
    names: tuple[str, ...]
    if name == huggingface.EMBEDDINGS[0]:
        names = (*huggingface.EMBEDDINGS, huggingface.OUTPUT)
    elif name == huggingface.OUTPUT:
        names = (huggingface.OUTPUT, *huggingface.EMBEDDINGS)
    else:
        names = (name,)
    return next((n for n in names if n in tensors.names), name)


def _check(config: T5Config, tensors: Tensors, folder: Path) -> None:
    """That the tensors are those of the configuration, in name and shape."""
    wanted = {
        _stored(theirs, tensors): _shape(ours, transposed, config)
        for ours, (theirs, transposed) in huggingface.tensor_names(config).items()
    }
    if missing := sorted(set(wanted) - tensors.names):
        raise UserError(
            f"{folder}: {len(missing)} of the tensors that {CONFIG} asks for are missing, the "
            f"first {missing[0]}; give an encoder-decoder T5 with all its weights"
        )
    for name, shape in wanted.items():
        if (found := tensors.shape(name)) != shape:
            raise UserError(
                f"{folder}: {name} is {list(found)}, but {CONFIG} says {list(shape)}; the two are "
                "not of one model"
            )
    shared = {*huggingface.EMBEDDINGS, huggingface.OUTPUT, *huggingface.UNUSED}
    if left := sorted(tensors.names - set(wanted) - shared):
        log.warning("%s: %d tensors are not used, the first %s", folder, len(left), left[0])


def _shape(ours: str, transposed: bool, config: T5Config) -> tuple[int, ...]:
    """Of a tensor as it is stored."""
    joined = config.num_heads * config.head_dim
    last, kind = ours.split("/")[-2:]
    if kind == "scale":
        return (config.embed_dim,)
    shapes = {
        "token_embedder": (config.vocab_size, config.embed_dim),
        "logits_dense": (config.embed_dim, config.vocab_size),
        "relpos_bias": (config.num_heads, config.relative_buckets),
        "out": (joined, config.embed_dim),
        "wo": (config.mlp_dim, config.embed_dim),
        **dict.fromkeys(("query", "key", "value"), (config.embed_dim, joined)),
        **dict.fromkeys(("wi", "wi_0", "wi_1"), (config.embed_dim, config.mlp_dim)),
    }
    return shapes[last][::-1] if transposed else shapes[last]


def write_checkpoint(params: Any, config: T5Config, folder: Path, *, text_model: bytes) -> None:
    """Writes config.json, model.safetensors and spiece.model into an existing folder.

    Args:
      params: the tree of `config`'s network, layers stacked or not; `log_temperature`, which T5
        has not, is left out.
      config: of the network.
      folder: an existing one.
      text_model: a serialised SentencePiece model.
    """
    flat = traverse_util.flatten_dict(unstack_layers(params), sep="/")
    tensors = {}
    for ours, (theirs, transposed) in huggingface.tensor_names(config).items():
        value = np.asarray(flat[ours], np.float32)
        tensors[theirs] = np.ascontiguousarray(value.T if transposed else value)
    # transformers asks for the format, and for nothing else of the metadata.
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(huggingface.config_json(config), indent=2) + "\n")
    (folder / TEXT_MODEL).write_bytes(text_model)
