"""Losses: pure functions of arrays in the global view, each returning a LossOutput.

Under `jax.jit` with sharded inputs the arrays are global, so a mean here is a mean over the whole
batch, and no collective is written by hand.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class LossOutput:
    """A loss and what it is made of.

    Attributes:
      loss: float32 scalar to differentiate.
      parts: float32 scalars to log, each already averaged; their weighted sum is `loss` where a
        loss has several terms.
      weight: float32 scalar, what the averages divide by (tokens or queries).
    """

    loss: Array
    parts: dict[str, Array]
    weight: Array


def docid_cross_entropy(
    logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossOutput:
    """Cross-entropy of docid tokens, averaged over tokens of weight > 0.

    With smoothing s and V ids that can be written (those of finite logit), the target
    distribution is (1 - s) at the token plus s / V everywhere (Szegedy et al. 2016). The z-loss
    is z * (log sum_v exp logit_v)^2, which keeps the normaliser near 1 (Mesh TensorFlow, T5X).

    Args:
      logits: over the docid vocabulary; -inf for an id that is never written, such as padding.
      targets: local docid ids.
      weights: 0 at padding.
      label_smoothing: s, in [0, 1).
      z_loss: z, 0 or a small number such as 1e-4.

    Returns:
      LossOutput with parts `cross_entropy` (without smoothing and z-loss, so that runs with
      different settings compare), `z_loss`, `token_accuracy` and `docid_accuracy` (all tokens of
      a row right).

    Example:
      >>> out = docid_cross_entropy(jnp.zeros((1, 1, 4)), jnp.ones((1, 1), int), jnp.ones((1, 1)))
      >>> round(float(out.loss), 4)  # log 4
      1.3863
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), found {label_smoothing}")
    logits = logits.astype(jnp.float32)
    writable = jnp.isfinite(logits)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - log_normaliser[..., None]
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    nll = jnp.where(weights > 0, nll, 0.0)  # a padding target has logit -inf
    total = jnp.where(weights.sum() > 0, weights.sum(), 1.0)
    cross_entropy = (nll * weights).sum() / total
    loss = cross_entropy
    if label_smoothing:
        uniform = -jnp.where(writable, log_p, 0.0).sum(-1) / writable.sum(-1)
        smooth = (uniform * weights).sum() / total
        loss = (1 - label_smoothing) * cross_entropy + label_smoothing * smooth
    z = z_loss * (jnp.square(log_normaliser) * weights).sum() / total
    right = (logits.argmax(-1) == targets) | (weights == 0)
    rows = (weights > 0).any(-1)
    parts = {
        "cross_entropy": cross_entropy,
        "z_loss": z,
        "token_accuracy": (right * weights).sum() / total,
        "docid_accuracy": (right.all(-1) & rows).sum() / jnp.maximum(rows.sum(), 1),
    }
    return LossOutput(loss=loss + z, parts=parts, weight=weights.sum())


def symmetric_divergence(
    logits: Float[Array, "*rows length vocab"],
    others: Float[Array, "*rows length vocab"],
    counted: Bool[Array, "*rows length"],
) -> Float[Array, ""]:
    """(KL(p || q) + KL(q || p)) / 2, averaged over the tokens that count, in nats.

    With two passes that draw different dropout this is R-Drop's consistency (Liang et al. 2021),
    by which NCI (Wang et al. 2022) makes its decoder agree with itself.

    Args:
      logits, others: of p and q; -inf at the same places, for ids that are never written.
      counted: False at padding.

    Example:
      >>> p, q = jnp.log(jnp.array([[[0.5, 0.5]], [[0.75, 0.25]]]))
      >>> round(float(symmetric_divergence(p, q, jnp.ones(1, bool))), 4)  # log(3) / 8
      0.1373
    """
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, others))
    some = jnp.isfinite(log_p) & jnp.isfinite(log_q)
    apart = jnp.where(some, log_p, 0.0) - jnp.where(some, log_q, 0.0)
    both = 0.5 * ((jnp.exp(log_p) - jnp.exp(log_q)) * apart).sum(-1)
    return jnp.where(counted, both, 0.0).sum() / jnp.maximum(counted.sum(), 1)
