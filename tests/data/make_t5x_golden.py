"""Makes t5x_golden.npz: what T5X itself computes of a tiny seeded network. Needs T5X installed.

    python tests/data/make_t5x_golden.py

Kept are the parameters of T5X's own network, inputs, and from T5X: logits, and a beam search that
is wide enough to find every sequence.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import seqio
from flax import traverse_util
from t5x import models
from t5x.examples.t5 import network

VOCAB = 7


def main() -> None:
    config = network.T5Config(
        vocab_size=VOCAB,
        emb_dim=8,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=4,
        mlp_dim=12,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
    )
    vocabulary = seqio.PassThroughVocabulary(VOCAB, eos_id=1)
    model = models.EncoderDecoderModel(
        network.Transformer(config),
        vocabulary,
        vocabulary,
        optimizer_def=None,
        default_decoder_params=models.DecoderParams(return_all_decodes=True, num_decodes=200),
    )
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, VOCAB, (3, 6)).astype(np.int32)
    inputs[1, 4:] = 0
    targets = np.array([[2, 5, 1], [3, 1, 0], [6, 6, 1]], np.int32)
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
    }
    shapes = {k: v.shape for k, v in batch.items()}
    types = {k: v.dtype for k, v in batch.items()}
    params = model.get_initial_variables(jax.random.key(0), shapes, types)["params"]
    # Larger than fresh ones, so that logits differ visibly.
    params = jax.tree.map(lambda x: jnp.asarray(x * 1.5, jnp.float32), dict(params))
    logits = model._compute_logits(params, batch)
    tokens, aux = model.predict_batch_with_aux(params, batch, decoder_params={"alpha": 0.0})
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    np.savez_compressed(
        Path(__file__).with_name("t5x_golden.npz"),
        **{f"params/{name}": np.asarray(value) for name, value in flat.items()},
        **{f"batch/{name}": value for name, value in batch.items()},
        logits=np.asarray(logits),
        beam_tokens=np.asarray(tokens),
        beam_scores=np.asarray(aux["scores"]),
    )


if __name__ == "__main__":
    main()
