"""Losses of stage 2: docids and vectors of queries and documents are learned together.

Pure functions of arrays in the global view, as in `losses`: under `jax.jit` with sharded inputs the
in-batch columns are the documents of the whole batch, on however many devices it lies.

Sources: DOGR (Lu et al., AAAI 2025) adds two contrastive losses to the docid loss, one over
documents whose docids share a prefix with the positive's, one over documents that a retriever
brings. Its code is not public and we know of no published values for its constants (weights of the
terms, temperature, numbers of negatives); what stands here as a default is neutral, not theirs.
InfoNCE is van den Oord et al. 2018.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from genret_jax.modeling.losses import LossOutput, docid_cross_entropy

Similarity: TypeAlias = Literal["cosine", "dot"]

# A vector shorter than this counts as zero. Its direction is noise, and the gradient of the cosine,
# which grows with 1 / length, would swamp every other row's.
SHORTEST = 1e-6

# Accelerators round the factors of a matrix product to 10 or 7 bits unless told otherwise. Divided
# by a small temperature, that is no longer small; next to the encoder, these products are.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def info_nce(
    query: Float[Array, "batch embed"],
    positive: Float[Array, "batch embed"],
    negatives: Float[Array, "batch negatives embed"] | None = None,
    *,
    temperature: float | Float[Array, ""],
    in_batch: bool,
    similarity: Similarity = "cosine",
    share_negatives: bool = False,
    negative_mask: Bool[Array, "batch negatives"] | None = None,
    in_batch_mask: Bool[Array, "batch batch"] | None = None,
    shared_mask: Bool[Array, "batch batch*negatives"] | None = None,
    weights: Float[Array, " batch"] | None = None,
) -> LossOutput:
    """InfoNCE: the positive against every usable negative (van den Oord et al. 2018).

    With s(q, d) the similarity over the temperature, a row costs
    -log(exp s(q, p) / (exp s(q, p) + sum_j exp s(q, n_j)))
    = log(1 + sum_j exp(s(q, n_j) - s(q, p))), and the loss is the weighted mean over rows. A row
    without a usable negative costs log 1 = 0. Everything is computed in float32. The cosine with a
    zero vector is 0, and passes no gradient.

    Queries with several relevant documents: `positive` holds one of them; the others, where they
    appear among the columns, must be masked, or they are pushed away (see `usable_columns`). The
    same document in two columns counts twice.

    Args:
      query: one vector a row, any floating type.
      positive: vector of a document that answers the row's query.
      negatives: vectors of the row's own hard negatives.
      temperature: > 0; a scalar array where it is learned.
      in_batch: the positives of the other rows are negatives too.
      similarity: "cosine" or "dot".
      share_negatives: the hard negatives of the other rows are negatives too.
      negative_mask: False where one of `negatives` is padding or must not count.
      in_batch_mask: [row, other row], False where the other row's positive must not count. The
        diagonal, the row's own positive, never does.
      shared_mask: [row, other row * negatives + number], the same for shared negatives. A row's
        own block is read from `negative_mask` alone, so that nothing counts twice.
      weights: of the rows; 0 takes a row out of the averages, not out of the others' columns.
        Default 1.

    A mask left out is all True; a mask for columns that are not used is ignored.

    Returns:
      LossOutput with parts `info_nce` (the loss) and `accuracy`, the share of rows whose positive
      scores above all usable negatives (rows without any included); `weight` is the sum of weights.

    Example:
      >>> same = jnp.ones((2, 4))
      >>> round(float(info_nce(same, same, temperature=1.0, in_batch=True).loss), 4)  # log 2
      0.6931
    """
    if similarity not in get_args(Similarity):
        raise ValueError(f"similarity must be one of {get_args(Similarity)}, found {similarity!r}")
    if isinstance(temperature, float | int) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, found {temperature}")
    if negatives is None and (share_negatives or not in_batch):
        raise ValueError("there is nothing to contrast with: give negatives, or set in_batch alone")
    ready = _unit if similarity == "cosine" else _float32
    query, positive = ready(query), ready(positive)
    hard = None if negatives is None else ready(negatives)
    columns = _columns(query, positive if in_batch else None, hard, share_negatives)
    masks = {"in_batch": in_batch_mask, "own": negative_mask, "shared": shared_mask}
    own_score = _einsum("qe,qe->q", query, positive)
    margins = [jnp.zeros((len(query), 1), jnp.float32)]  # the positive's over itself
    for name, (scores, usable) in columns.items():
        mask = masks[name]
        usable = usable if mask is None else usable & mask
        margin = (scores - own_score[:, None]) / jnp.asarray(temperature, jnp.float32)
        margins.append(jnp.where(usable, margin, -jnp.inf))
    margin = jnp.concatenate(margins, axis=1)
    weights = jnp.ones(len(query), jnp.float32) if weights is None else weights.astype(jnp.float32)
    total = jnp.where(weights.sum() > 0, weights.sum(), 1.0)
    loss = (jax.nn.logsumexp(margin, axis=1) * weights).sum() / total
    accuracy = ((margin[:, 1:] < 0).all(1) * weights).sum() / total
    parts = {"info_nce": loss, "accuracy": accuracy}
    return LossOutput(loss=loss, parts=parts, weight=weights.sum())


def _columns(
    query: Float[Array, "batch embed"],
    positive: Float[Array, "batch embed"] | None,
    negatives: Float[Array, "batch negatives embed"] | None,
    share_negatives: bool,
) -> dict[str, tuple[Float[Array, "batch columns"], Bool[Array, "batch columns"]]]:
    """Scores of every kind of negative, and where a column is one at all."""
    found = {}
    batch = len(query)
    others = ~jnp.eye(batch, dtype=bool)
    if positive is not None:
        found["in_batch"] = _einsum("qe,pe->qp", query, positive), others
    if negatives is not None:
        own = _einsum("qe,qne->qn", query, negatives)
        found["own"] = own, jnp.ones(own.shape, bool)
        if share_negatives:
            number = negatives.shape[1]
            scores = _einsum("qe,pne->qpn", query, negatives).reshape(batch, batch * number)
            found["shared"] = scores, jnp.repeat(others, number, axis=1)
    return found


def _float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x.astype(jnp.float32)


def _unit(x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
    """float32 vectors of length 1; zero, with zero gradient, where x is as good as zero."""
    x = _float32(x)
    square = jnp.square(x).sum(-1, keepdims=True)
    some = square > SHORTEST**2
    # The inner `where` keeps 0 ** -1.5 out of the derivative, where 0 * inf would be NaN.
    return jnp.where(some, x * jax.lax.rsqrt(jnp.where(some, square, 1.0)), 0.0)


def usable_columns(
    document_index: Int[Array, " batch"],
    negative_index: Int[Array, "batch negatives"],
    relevant_index: Int[Array, "batch relevant"],
    document_row: Int[Array, " batch"],
    negative_row: Int[Array, "batch negatives"],
) -> tuple[
    Bool[Array, "batch batch"],
    Bool[Array, "batch negatives"],
    Bool[Array, "batch batch*negatives"],
]:
    """Which columns may count as negatives of a row: the masks of `info_nce`.

    A column may not when it is padding, is the row's own positive document, is relevant to the
    row's query, or has the docid of the row's positive (to push it away would push at the docid
    that is learned at the same time).

    Args:
      document_index: int32, the positive document of every row; -1 = a row of padding.
      negative_index: int32, the row's hard negatives; -1 = padding.
      relevant_index: int32, all documents known to be relevant to the row's query; -1 = padding.
        Whether the row's own positive is among them makes no difference.
      document_row, negative_row: int32, the number of each document's docid, anything at padding.
        `DocidTable` keeps equal docids of several documents as several rows: number them alike.

    Returns:
      `in_batch_mask`, `negative_mask` and `shared_mask`. In the last, a row's own block equals
      `negative_mask`.
    """
    batch, number = negative_index.shape

    def usable(index: Array, row: Array) -> Array:
        """Columns [1 or batch, columns] -> bool[batch, columns]."""
        known = jnp.concatenate([document_index[:, None], relevant_index], axis=1)
        relevant = (index[:, :, None] == known[:, None, :]).any(-1)
        return (index >= 0) & ~relevant & (row != document_row[:, None])

    in_batch = usable(document_index[None], document_row[None])
    own = usable(negative_index, negative_row)
    flat = (1, batch * number)
    shared = usable(negative_index.reshape(flat), negative_row.reshape(flat))
    return in_batch, own, shared


@dataclasses.dataclass(frozen=True)
class JointWeights:
    """What each term of `joint_loss` is multiplied by; 0 switches a term off.

    Attributes:
      generation: docid cross-entropy.
      prefix: InfoNCE over negatives whose docids share a prefix with the positive's.
      retrieval: InfoNCE over negatives that a retriever brought, and the batch's.
    """

    generation: float = 1.0
    prefix: float = 1.0
    retrieval: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"weight {name} must be a number >= 0, found {value}")


def joint_loss(
    logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    token_weights: Float[Array, "batch length"],
    query: Float[Array, "rows embed"],
    positive: Float[Array, "rows embed"],
    prefix_negatives: Float[Array, "rows prefix embed"],
    retrieved_negatives: Float[Array, "rows retrieved embed"],
    *,
    temperature: float | Float[Array, ""],
    weights: JointWeights | None = None,
    similarity: Similarity = "cosine",
    share_negatives: bool = False,
    prefix_mask: Bool[Array, "rows prefix"] | None = None,
    retrieved_mask: Bool[Array, "rows retrieved"] | None = None,
    in_batch_mask: Bool[Array, "rows rows"] | None = None,
    shared_mask: Bool[Array, "rows rows*retrieved"] | None = None,
    row_weights: Float[Array, " rows"] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossOutput:
    """Stage 2 in the manner of DOGR (Lu et al., AAAI 2025), with constants of our own.

    loss = generation * docid_cross_entropy + prefix * InfoNCE(prefix negatives)
    + retrieval * InfoNCE(retrieved negatives, positives of the other rows).

    The prefix term is averaged over the rows that have a usable prefix negative: many documents
    share no prefix with another. A term of weight 0 is reported, but gives no loss and no gradient.

    Args:
      logits, targets, token_weights, label_smoothing, z_loss: see `docid_cross_entropy`.
      query, positive, temperature, similarity: see `info_nce`, for both contrastive terms.
      prefix_negatives, retrieved_negatives: hard negatives; may be of length 0.
      weights: of the terms; default 1 each.
      share_negatives: retrieved negatives of other rows count too.
      prefix_mask, retrieved_mask, in_batch_mask, shared_mask: see `usable_columns`, called once
        with each kind of negatives; the last two belong to the retrieval term.
      row_weights: 0 at rows of padding, for both contrastive terms. Default 1.

    Returns:
      LossOutput with the parts of `docid_cross_entropy` and `prefix_nce`, `prefix_accuracy`,
      `retrieval_nce`, `retrieval_accuracy`; `weight` is the sum of `row_weights`.
    """
    weights = weights or JointWeights()
    rows = jnp.ones(len(query), jnp.float32) if row_weights is None else row_weights
    alike = jnp.ones(prefix_negatives.shape[:2], bool) if prefix_mask is None else prefix_mask
    generation = docid_cross_entropy(
        logits, targets, token_weights, label_smoothing=label_smoothing, z_loss=z_loss
    )
    contrast = functools.partial(
        info_nce, query, positive, temperature=temperature, similarity=similarity
    )
    prefix = contrast(
        prefix_negatives,
        in_batch=False,
        negative_mask=alike,
        weights=jnp.where(alike.any(1), rows, 0.0),
    )
    retrieval = contrast(
        retrieved_negatives,
        in_batch=True,
        share_negatives=share_negatives,
        negative_mask=retrieved_mask,
        in_batch_mask=in_batch_mask,
        shared_mask=shared_mask,
        weights=rows,
    )
    factors = dataclasses.astuple(weights)
    terms = zip(factors, (generation.loss, prefix.loss, retrieval.loss), strict=True)
    # A term that is off is left out: 0 times a gradient of inf would be NaN.
    loss = sum((w * term for w, term in terms if w), start=jnp.zeros((), jnp.float32))
    parts = {
        **generation.parts,
        "prefix_nce": prefix.loss,
        "prefix_accuracy": prefix.parts["accuracy"],
        "retrieval_nce": retrieval.loss,
        "retrieval_accuracy": retrieval.parts["accuracy"],
    }
    return LossOutput(loss=loss, parts=parts, weight=retrieval.weight)


def in_chunks(
    encode: Callable[..., Float[Array, "n embed"]],
    tokens: PyTree[Shaped[Array, "n ..."]],
    *,
    chunk: int,
    rng: Array | None = None,
) -> Float[Array, "n embed"]:
    """`encode(tokens)`, chunk by chunk, in the memory of one chunk, forward and backward.

    A contrastive batch is large because its vectors must meet, not its activations. So only the
    vectors are kept, and the activations of a chunk are computed again when its gradient is due:
    a second forward pass for the memory of a chunk. Vectors and gradients are those of one call,
    up to rounding. This is the gradient cache of Gao et al. 2021 ("Scaling Deep Contrastive
    Learning Batch Size under Memory Limited Setup"), left to automatic differentiation.

    Chunk c of C takes the rows c, c + C, c + 2 C, ... so that, where rows are spread over devices,
    every chunk is too; for that `chunk` must divide n and be a multiple of the number of devices
    along the batch.

    Args:
      encode: each row on its own: a function of `tokens`' structure (leading dimension any),
        and of a key when `rng` is given. It may close over parameters.
      tokens: arrays whose first dimension is n. The last chunk is filled up with rows from the
        beginning (not zeros, which an encoder may turn into NaN), and their vectors are dropped.
      chunk: rows at a time; 0, or n and more, is one call that keeps its activations.
      rng: key for dropout; chunk number c gets `fold_in(rng, c)`, forward and backward. The
        dropout masks therefore depend on `chunk`.
    """
    if chunk < 0:
        raise ValueError(f"chunk must be >= 0, found {chunk}")
    n = jax.tree.leaves(tokens)[0].shape[0]

    def encode_one(part: tuple[Int[Array, ""] | int, PyTree]) -> Array:
        number, rows = part
        return encode(rows) if rng is None else encode(rows, jax.random.fold_in(rng, number))

    if chunk == 0 or chunk >= n:
        return encode_one((0, tokens))
    count = -(-n // chunk)

    def split(x: Array) -> Array:
        x = jnp.concatenate([x, x[: count * chunk - n]])
        return x.reshape(chunk, count, *x.shape[1:]).swapaxes(0, 1)

    # Inside a loop nothing can be merged with the first pass, so prevent_cse would only cost.
    body = jax.checkpoint(encode_one, prevent_cse=False)
    vectors = jax.lax.map(body, (jnp.arange(count), jax.tree.map(split, tokens)))
    return vectors.swapaxes(0, 1).reshape(count * chunk, *vectors.shape[2:])[:n]
