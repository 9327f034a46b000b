"""Hierarchical k-means identifiers: the path to a document in a tree of clusters (DSI, NCI)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Int32

from genret_jax.docids.features import document_features
from genret_jax.docids.kmeans import fit_centroids, nearest
from genret_jax.docids.progress import progress
from genret_jax.docids.table import EOS_LABEL, FIRST_ID, PAD_LABEL, DocidTable, Setting
from genret_jax.errors import UserError

Paths: TypeAlias = "list[tuple[int, ...]]"


def hierarchical_docids(
    texts: Sequence[str],
    *,
    clusters: int = 30,
    leaf: int = 30,
    own_tokens: bool = True,
    features: str = "tfidf",
    dimensions: int = 128,
    seed: int = 0,
) -> DocidTable:
    """Names each text by its path in a tree of k-means clusters.

    A group of more than `leaf` documents is split into `clusters` groups, each of them again, and
    the last number counts the documents of a leaf. Identifiers are unique by construction.

    Args:
      texts: one for each document, in corpus order.
      clusters: k, the groups that a group is split into (30 in NCI).
      leaf: c, most documents in a group that is not split (30 in NCI).
      own_tokens: every level has its own tokens, as in NCI, since "the third group" means another
        thing in every group. False: one set of numbers for all levels, as in DSI.
      features: see `genret_jax.docids.features.document_features`.
      dimensions: of the vectors.
      seed: of the vectors and the clusters.

    Returns:
      One row a text. Labels are "level:number", or the number alone with shared tokens.

    Raises:
      UserError: a setting out of range.
    """
    settings: dict[str, Setting] = {name: v for name, v in locals().items() if name != "texts"}
    vectors = document_features(texts, features=features, dimensions=dimensions, seed=seed)
    paths = cluster_paths(vectors, clusters=clusters, leaf=leaf, seed=seed)
    sequences, labels = path_tokens(paths, own_tokens=own_tokens)
    return DocidTable.from_sequences(
        sequences, range(len(sequences)), labels, "hierarchical", settings
    )


def cluster_paths(
    vectors: Float32[np.ndarray, "docs embed"], *, clusters: int, leaf: int, seed: int = 0
) -> Paths:
    """The path of every vector: group numbers from the root, then its place in the leaf.

    Args:
      vectors: float32[docs, embed].
      clusters: groups that a group is split into, 2 or more.
      leaf: most vectors in a group that is not split.
      seed: of k-means.

    Returns:
      One tuple a vector, all distinct, none a prefix of another.

    Raises:
      UserError: a setting out of range.
    """
    for name, value, least in (("clusters", clusters, 2), ("leaf", leaf, 1)):
        if value < least:
            raise UserError(f"{name} = {value}: give {least} or more")
    # Vectors that peel off one by one would make paths as long as the corpus. Twice the depth of an
    # even tree is room enough for uneven groups; below it they are split evenly.
    even_depth = math.ceil(math.log(max(len(vectors) / leaf, 1.0), clusters))
    deepest = 2 * even_depth + 2
    paths: list[tuple[int, ...]] = [()] * len(vectors)
    waiting: list[tuple[tuple[int, ...], np.ndarray]] = [((), np.arange(len(vectors)))]
    with progress(description="cluster", total=len(vectors)) as bar:
        while waiting:
            prefix, rows = waiting.pop()
            if len(rows) <= leaf:
                for place, row in enumerate(rows):
                    paths[row] = (*prefix, place)
                bar.update(len(rows))
                continue
            groups = _split(vectors[rows], clusters, seed, evenly=len(prefix) >= deepest)
            for group in range(groups.max() + 1):
                waiting.append(((*prefix, group), rows[groups == group]))
    return paths


def _split(
    vectors: np.ndarray, clusters: int, seed: int, *, evenly: bool
) -> Int32[np.ndarray, " docs"]:
    """int32[docs]: the group of each vector, numbered from 0 without gaps, two groups or more."""
    if not evenly:
        groups = nearest(vectors, fit_centroids(vectors, clusters=clusters, seed=seed))
        present, groups = np.unique(groups, return_inverse=True)
        if len(present) > 1:
            return groups.astype(np.int32)
    # Equal vectors have no clusters: cut them into even runs, so that the tree still ends.
    return (np.arange(len(vectors)) * min(clusters, len(vectors)) // len(vectors)).astype(np.int32)


def path_tokens(
    paths: Sequence[Sequence[int]], *, own_tokens: bool
) -> tuple[list[list[int]], list[str]]:
    """Local ids for paths of numbers, one token for each number that is used.

    Args:
      paths: numbers from the root down.
      own_tokens: a number means another token at every level.

    Returns:
      The sequences, and the labels of all local ids.
    """

    def key(level: int, number: int) -> tuple[int, int]:
        return (level + 1 if own_tokens else 0, number)

    used = sorted({key(level, n) for path in paths for level, n in enumerate(path)})
    ids = {pair: FIRST_ID + position for position, pair in enumerate(used)}
    sequences = [[ids[key(level, n)] for level, n in enumerate(path)] for path in paths]
    labels = [f"{level}:{number}" if own_tokens else str(number) for level, number in used]
    return sequences, [PAD_LABEL, EOS_LABEL, *labels]
