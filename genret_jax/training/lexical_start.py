"""Fresh parameters that already match words: a network that begins as latent semantic analysis.

A small network trained from scratch must learn from a few queries a document which documents each
word speaks for. Counting knows that before the first step: with the singular value decomposition
X = U S V' of the weighted document-by-piece matrix (Deerwester et al. 1990), a query is near a
document when the sum of its pieces' vectors is near the document's. The parameters are set so that
the first decoder state is that sum and the logit of a docid token is its inner product with the
documents that carry the token:

- A piece's embedding is its vector, of a length below one, completed to length one in a dimension
  of its own, so that the encoder's norm keeps how much the piece counts.
- Cross-attention in the last decoder layer averages over the input: its queries are zero, and its
  value and output matrices are each other's transposes, without that extra dimension.
- Every other layer begins as the identity: its output matrices are zero.
- A docid token's output column is the mean direction of the documents that carry it. Its embedding,
  where that is another matrix, is faint: the second token is chosen by the same words as the first.
- Adam moves every number by about the learning rate, so the matrices that hold the analysis are
  made of larger numbers, and the norms before them give smaller ones: the product is the same, and
  a step changes it less than it changes what begins at zero.

Everything is trained from there. What this buys is in the README.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import scipy.sparse
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from genret_jax.data.examples import Ragged, TrainingExamples
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import Params
from genret_jax.vocabularies import DocidSpace

_SATURATION = 1.5  # BM25's k1
_LENGTH = 0.4  # BM25's b
COMMON = 95  # percentile of the pieces' weights that counts as full weight
GAIN = 4.0  # by which matrices are larger and norms smaller
_FAINT = 0.1  # of a fresh embedding is what a docid token is read by
_SHARPNESS = 1.5  # logits at the start are up to this times sqrt(embed)


def lexical_start(
    params: Params,
    examples: TrainingExamples,
    config: T5Config,
    docids: DocidSpace,
    *,
    seed: int = 0,
) -> Params:
    """Parameters that score documents as latent semantic analysis does.

    Args:
      params: fresh ones, on the host: a tree of float32 arrays.
      examples: texts and train queries of the documents; never those of dev or test.
      config: of the network.
      docids: where docid tokens stand.
      seed: of the decomposition and the rotation.

    Returns:
      A tree of the same shapes.
    """
    rank = _rank(config)
    pieces, documents = semantic_vectors(examples, docids.start, rank=rank, seed=seed)
    columns = _docid_columns(examples, documents, docids)
    return _matching(params, config, pieces, columns, docids.start, seed)


def _rank(config: T5Config) -> int:
    """Dimensions that the embedding and the heads of cross-attention have room for."""
    return min(config.embed_dim - 1, config.num_heads * config.head_dim)


def _matching(
    params: Params,
    config: T5Config,
    pieces: np.ndarray,
    columns: np.ndarray,
    start: int,
    seed: int,
) -> Params:
    """Parameters whose first decoder state is the sum of the input's pieces.

    Args:
      params: fresh ones; copied.
      config: of the network.
      pieces: float32[pieces, rank], vectors.
      columns: float32[tokens, rank], of length one or zero, of the tokens that are written.
      start: the id of the first of these.
      seed: of the rotation.
    """
    rank = pieces.shape[1]
    params = jax.tree.map(np.array, params)
    silence(params)
    _set_embeddings(params["token_embedder"]["embedding"], pieces)
    layer = last_layer(params["decoder"], config)
    set_attention(layer["encoder_decoder_attention"], rank, seed)
    for side in ("encoder", "decoder"):
        params[side][f"{side}_norm"]["scale"] /= GAIN
    columns = columns * _SHARPNESS * GAIN
    block = slice(start, start + len(columns))
    if config.tied_embeddings:
        # The network multiplies by embed^-1/2 where input and output share the embedding.
        rows = np.zeros((len(columns), config.embed_dim), np.float32)
        rows[:, :rank] = columns * config.embed_dim**0.5
        params["token_embedder"]["embedding"][block] = rows
    else:
        params["token_embedder"]["embedding"][block] *= _FAINT
        kernel = params["decoder"]["logits_dense"]["kernel"]
        kernel[:, block] = 0.0
        kernel[:rank, block] = columns.T
    return params


def lexical_encoder(
    params: Params,
    examples: TrainingExamples,
    config: T5Config,
    pieces: int,
    *,
    seed: int = 0,
) -> Params:
    """Parameters of an encoder alone, by which texts are as near as latent semantic analysis says.

    The mean of the encoder's output over a text is the mean of its pieces' vectors; the dimension
    that completes embeddings to length one is scaled to 0, for all texts would be alike in it.

    Args:
      params: fresh ones, on the host, of `token_embedder` and `encoder`.
      examples: texts and train queries of the documents; never those of dev or test.
      config: of the network.
      pieces: text pieces in the vocabulary.
      seed: of the decomposition.

    Returns:
      A tree of the same shapes.
    """
    vectors, _ = semantic_vectors(examples, pieces, rank=config.embed_dim - 1, seed=seed)
    params = jax.tree.map(np.array, params)
    silence(params)
    _set_embeddings(params["token_embedder"]["embedding"], vectors)
    params["encoder"]["encoder_norm"]["scale"][-1] = 0.0
    return params


def semantic_vectors(
    examples: TrainingExamples, pieces: int, *, rank: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Latent semantic analysis of the documents, their train queries included.

    Args:
      examples: tokens of titles, bodies and queries.
      pieces: text pieces in the vocabulary.
      rank: dimensions wanted; those beyond what the matrix has are zero.
      seed: of the randomised decomposition.

    Returns:
      float32[pieces, rank], a query being the sum of its pieces' vectors, and float32[documents,
      rank] of length one (zero for a document without text).
    """
    counts = counts_of(examples, pieces)
    documents = counts.shape[0]
    frequency = np.bincount(counts.col, minlength=pieces)
    idf = np.log1p((documents - frequency + 0.5) / (frequency + 0.5))
    length = np.bincount(counts.row, counts.data, minlength=documents)
    relative = length[counts.row] / max(length.mean(), 1e-9)
    saturated = counts.data / (counts.data + _SATURATION * (1 - _LENGTH + _LENGTH * relative))
    matrix = scipy.sparse.csr_matrix(
        ((saturated * idf[counts.col]).astype(np.float32), (counts.row, counts.col)),
        shape=counts.shape,
    )
    with threadpool_limits(1):  # the last bits must not depend on the number of threads
        left, scale, right = randomized_svd(
            matrix, n_components=min(rank, *matrix.shape), n_iter=4, random_state=seed
        )
    # Where documents are equal, or empty, there are directions of no weight: rounding noise.
    right = np.where(scale[:, None] > 1e-6 * scale.max(initial=1e-9), right, 0.0)
    piece_vectors = right.T * np.sqrt(idf)[:, None]
    document_vectors = left * scale
    lengths = np.linalg.norm(document_vectors, axis=1, keepdims=True)
    document_vectors /= np.where(lengths > 1e-6, lengths, 1.0)
    missing = ((0, 0), (0, rank - len(scale)))
    return (
        np.pad(piece_vectors, missing).astype(np.float32),
        np.pad(document_vectors, missing).astype(np.float32),
    )


def counts_of(examples: TrainingExamples, pieces: int) -> scipy.sparse.coo_matrix:
    """How often each document and its train queries hold each piece: [documents, pieces]."""
    documents = len(examples.document_rows)

    def cells(sequences: Ragged, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(owners, sequences.lengths), sequences.values

    everyone = np.arange(documents)
    parts = [
        cells(examples.titles, everyone),
        cells(examples.bodies, everyone),
        cells(examples.queries, examples.query_documents),
    ]
    rows, columns = (np.concatenate(x) for x in zip(*parts, strict=True))
    ones = np.ones(len(rows), np.float32)
    counts = scipy.sparse.coo_matrix((ones, (rows, columns)), shape=(documents, pieces))
    counts.sum_duplicates()
    return counts


def last_layer(decoder: Params, config: T5Config) -> Params:
    """Arrays of the last decoder layer; writing to them writes to the decoder's."""
    if config.scan_layers:
        return jax.tree.map(lambda x: x[-1], decoder["layers"])
    return decoder[f"layers_{config.num_decoder_layers - 1}"]


def silence(params: Params) -> None:
    """Output matrices of attention and MLP become zero: each layer is the identity."""

    def visit(node: Any) -> None:
        for name, child in node.items():
            if name in ("out", "wo"):
                child["kernel"][:] = 0.0
            elif isinstance(child, dict):
                visit(child)

    visit(params)


def _set_embeddings(embedding: np.ndarray, pieces: np.ndarray) -> None:
    """Rows of length sqrt(embed), whose first dimensions are the pieces' vectors."""
    embed, rank = embedding.shape[1], pieces.shape[1]
    lengths = np.linalg.norm(pieces, axis=1)
    seen = lengths[lengths > 1e-9]  # a given vocabulary has pieces that no text here holds
    full = float(np.percentile(seen, COMMON)) if len(seen) else 1.0
    shorter = np.minimum(lengths / full, 1.0) / np.where(lengths > 1e-9, lengths, 1.0)
    vectors = pieces * shorter[:, None]
    rest = np.sqrt(np.maximum(1.0 - np.square(vectors).sum(1), 0.0))
    rows = embedding[: len(pieces)]
    rows[:] = 0.0
    rows[:, :rank] = vectors
    rows[:, -1] = rest
    rows *= embed**0.5
    rows[0] = 0.0  # padding, which is what the decoder begins with


def set_attention(attention: Any, rank: int, seed: int) -> None:
    """Cross-attention that averages over its input and passes the first `rank` dimensions on."""
    joined = attention["value"]["kernel"].shape[1]
    rng = np.random.default_rng([seed, 17])
    rotation = np.linalg.qr(rng.normal(size=(joined, rank)))[0].T.astype(np.float32)
    attention["query"]["kernel"][:] = 0.0
    attention["value"]["kernel"][:] = 0.0
    attention["value"]["kernel"][:rank] = rotation * GAIN
    attention["out"]["kernel"][:, :rank] = rotation.T * GAIN


def _docid_columns(
    examples: TrainingExamples, documents: np.ndarray, docids: DocidSpace
) -> np.ndarray:
    """float32[docid tokens, rank]: mean direction of the documents that carry each token."""
    rows = docids.to_local(examples.docids[examples.document_rows])
    columns = np.zeros((docids.size, documents.shape[1]), np.float32)
    for tokens in rows.T:
        np.add.at(columns, tokens, documents)
    return directions(columns[2:])


def directions(rows: np.ndarray) -> np.ndarray:
    """Rows of length one; zero ones stay so."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 1e-6, lengths, 1.0)
