"""What T5X asks of a model, written down as data (commit cc342d4): names and order of parameters.

T5X passes the first ones by position and looks up some others by name.
"""

from __future__ import annotations

MODEL_METHODS = {
    "loss_fn": ["params", "batch", "dropout_rng"],
    "eval_fn": ["params", "batch"],
    "predict_batch": ["params", "batch", "rng"],
    "predict_batch_with_aux": ["params", "batch", "rng"],
    "score_batch": ["params", "batch", "return_intermediates"],
    "get_initial_variables": ["rng", "input_shapes", "input_types"],
}
MODEL_ATTRIBUTES = [
    "FEATURE_CONVERTER_CLS",
    "optimizer_def",
    "input_vocabulary",
    "output_vocabulary",
]
# Logical axis names for which T5X's standard rules and its Adafactor have an entry.
LOGICAL_AXES = {"vocab", "embed", "mlp", "heads", "kv", "joined_kv", "relpos_buckets", "layers"}
