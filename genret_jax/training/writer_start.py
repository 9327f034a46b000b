"""Fresh parameters of a network that writes text: latent semantic analysis and a bigram model.

Where the decoder writes pieces of text, what comes next hangs on the query, on the piece before it,
and on how common a piece is. Counting knows something of all three. The parameters are set so that

    logit(w | query, previous piece v) = (a x . d(w) + b l(v) . r(w) + c e(v) log p(w)) / |x, l, e|

with x the vectors of the query's pieces (see `genret_jax.training.lexical_start`), averaged, and
that of v; d(w) the mean direction of documents that hold w; l . r the positive pointwise mutual
information of neighbours in what is to be written, of low rank (Levy and Goldberg 2014); p the
frequency in it; e what completes v's embedding to length one. The decoder's start is a piece, too.
The weights a, b and c are those of the least cross-entropy on a sample of the training examples: a
start that is sure of what it does not know is worse than none.

A quarter of the dimensions is the bigram model's. All else is as `lexical_start` has it.
"""

from __future__ import annotations

import jax
import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float, Int
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from genret_jax.data.examples import TrainingExamples
from genret_jax.errors import UserError
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import Params
from genret_jax.training.lexical_start import (
    COMMON,
    GAIN,
    counts_of,
    directions,
    last_layer,
    semantic_vectors,
    set_attention,
    silence,
)

_BIGRAM_SHARE = 4  # one in so many dimensions
_LEXICAL, _BIGRAM = 0.75, 0.5  # lengths of an embedding's parts, at most
_SHRINK = 5.0  # so many neighbours of a piece are taken to be drawn from all
_MOST_LOGITS = 10_000_000  # of the sample that the weights are fitted on: 120 MB of features
_MOST_PLACES = 2_000


def lexical_writer(
    params: Params,
    examples: TrainingExamples,
    config: T5Config,
    pieces: int,
    *,
    inputs: Int[np.ndarray, "n length"],
    targets: Int[np.ndarray, "n target"],
    seed: int = 0,
) -> Params:
    """Parameters that write what documents near the query hold, as the documents have it.

    Args:
      params: fresh ones, on the host: a tree of float32 arrays.
      examples: texts and train queries of the documents; never those of dev or test.
      config: of the network.
      pieces: text pieces in the vocabulary. Rows behind them begin alike and tell nothing yet.
      inputs, targets: of training, 0-padded.
      seed: of decompositions, rotation and sample.

    Returns:
      A tree of the same shapes.

    Raises:
      UserError: input and output share the embedding.
    """
    if config.tied_embeddings:
        raise UserError(
            "a lexical start of a network that writes text has output vectors of its own; set "
            "NetworkConfig.tied_embeddings to False, or TrainConfig.start to 'random'"
        )
    embed = config.embed_dim
    rank = embed // _BIGRAM_SHARE
    room = min(embed - 1 - rank, config.num_heads * config.head_dim)
    vectors, documents = semantic_vectors(examples, pieces, rank=room, seed=seed)
    held = counts_of(examples, pieces).tocsr()
    held.data[:] = 1.0
    left, right, log_p = bigrams(targets, pieces, rank=rank, seed=seed)
    lexical, before = _at_most(vectors, _LEXICAL), _at_most(left, _BIGRAM)
    lexical[0] = 0.0
    rest = np.sqrt(np.maximum(1 - np.square(lexical).sum(1) - np.square(before).sum(1), 0.0))
    rows = np.concatenate([lexical, before, rest[:, None]], axis=1).astype(np.float32)
    columns = [directions(np.asarray(held.T @ documents)), right, log_p[:, None]]
    parts = np.split(np.arange(room + rank + 1), [room, room + rank])
    weights = _fitted(rows, columns, parts, inputs, targets, np.random.default_rng([seed, 23]))
    params = jax.tree.map(np.array, params)
    silence(params)
    embedding = params["token_embedder"]["embedding"]
    # Dimensions between the parts and the last stay empty where the heads have less room.
    places = np.concatenate([np.arange(room + rank), [embed - 1]])
    embedding[:] = 0.0
    embedding[:pieces, places] = rows * embed**0.5
    embedding[pieces:, -1] = embed**0.5
    set_attention(last_layer(params["decoder"], config)["encoder_decoder_attention"], room, seed)
    for side in ("encoder", "decoder"):
        params[side][f"{side}_norm"]["scale"] /= GAIN
    kernel = params["decoder"]["logits_dense"]["kernel"]
    kernel[:, 1:pieces] = 0.0
    scaled = np.concatenate([w * c for w, c in zip(weights, columns, strict=True)], axis=1)
    kernel[places, 1:pieces] = scaled[1:].T * GAIN / embed**0.5
    return params


def bigrams(
    targets: Int[np.ndarray, "n target"], pieces: int, *, rank: int, seed: int
) -> tuple[
    Float[np.ndarray, "pieces rank"], Float[np.ndarray, "pieces rank"], Float[np.ndarray, " pieces"]
]:
    """Neighbours in what is to be written, 0 before the first of a row.

    Args:
      targets: 0-padded.
      pieces: in the vocabulary.
      rank: of the factors; what is more than the matrix has is zero.
      seed: of the decomposition.

    Returns:
      Factors of the positive pointwise mutual information, whose product is log p(w | v) - log p(w)
      in nats where that is above 0, for v by w; and log p(w).
    """
    before = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    there = targets > 0
    ones = np.ones(int(there.sum()))
    counts = scipy.sparse.coo_matrix((ones, (before[there], targets[there])), (pieces, pieces))
    counts.sum_duplicates()
    firsts, seconds = (np.asarray(counts.sum(axis)).ravel() for axis in (1, 0))
    log_p = np.log((seconds + 0.5) / (seconds.sum() + 0.5 * pieces))
    drawn = counts.data + _SHRINK * np.exp(log_p[counts.col])
    information = np.log(drawn / (firsts[counts.row] + _SHRINK)) - log_p[counts.col]
    matrix = scipy.sparse.csr_matrix(
        (np.maximum(information, 0.0), (counts.row, counts.col)), counts.shape
    )
    with threadpool_limits(1):  # the last bits must not depend on the number of threads
        left, scale, right = randomized_svd(
            matrix, n_components=min(rank, pieces), n_iter=4, random_state=seed
        )
    missing = ((0, 0), (0, rank - len(scale)))
    root = np.sqrt(scale)
    return np.pad(left * root, missing), np.pad(right.T * root, missing), log_p


def _at_most(vectors: np.ndarray, length: float) -> np.ndarray:
    """Vectors made shorter or longer alike, so that but for the longest none exceeds a length."""
    lengths = np.linalg.norm(vectors, axis=1)
    seen = lengths[lengths > 1e-9]
    full = float(np.percentile(seen, COMMON)) if len(seen) else 1.0
    wanted = length * np.minimum(lengths / full, 1.0)
    return vectors * (wanted / np.where(lengths > 1e-9, lengths, 1.0))[:, None]


def _fitted(
    rows: np.ndarray,
    columns: list[np.ndarray],
    parts: list[np.ndarray],
    inputs: np.ndarray,
    targets: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """The weights of least cross-entropy on a sample of places in targets."""
    places = np.argwhere(targets > 0)
    most = min(_MOST_PLACES, max(1, _MOST_LOGITS // len(rows)), len(places))
    i, step = places[rng.choice(len(places), most, replace=False)].T
    before = np.where(step > 0, targets[i, np.maximum(step - 1, 0)], 0)
    states = rows[before]
    known = np.where(inputs[i] < len(rows), inputs[i], 0)  # a view's mark holds nothing
    read = (inputs[i] > 0).sum(1, keepdims=True)
    lexical = parts[0]
    states[:, lexical] += GAIN * rows[:, lexical][known].sum(1) / read
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    wanted = targets[i, step]
    features = np.stack(  # 0 is padding, and is never written
        [states[:, part] @ column[1:].T for part, column in zip(parts, columns, strict=True)]
    ).astype(np.float32)
    right = features[:, np.arange(most), wanted - 1]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.tensordot(weights.astype(np.float32), features, 1)
        highest = logits.max(1, keepdims=True)
        chances = np.exp(logits - highest)
        total = chances.sum(1, keepdims=True)
        chances /= total
        nats = highest[:, 0] + np.log(total[:, 0]) - weights @ right
        expected = [(chances * feature).sum(1).mean() for feature in features]
        gradient = [e - r.mean() for e, r in zip(expected, right, strict=True)]
        return float(nats.mean()), np.array(gradient, np.float64)

    found = scipy.optimize.minimize(
        loss, np.array([10.0, 5.0, 1.0]), jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * 3
    )
    return np.asarray(found.x)
