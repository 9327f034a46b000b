"""k-means as the clustering and quantising families use it: bounded work, one result per seed."""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float32, Int32

# Centroids settle long before they have seen every vector; 256 a centroid is what faiss draws.
_SAMPLE_PER_CENTROID = 256
_CHUNK = 1 << 24  # distances held at a time: 64 MB


def fit_centroids(
    vectors: Float32[np.ndarray, "docs embed"], *, clusters: int, seed: int
) -> Float32[np.ndarray, "clusters embed"]:
    """Centroids of k-means (Lloyd, k-means++ start) on a sample of the vectors.

    Args:
      vectors: float32[docs, embed], one or more.
      clusters: wanted; fewer are returned where there are fewer distinct vectors.
      seed: of the sample and the start.

    Returns:
      float32[clusters, embed], each the nearest to at least one vector of the sample.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    wanted = clusters * _SAMPLE_PER_CENTROID
    if len(vectors) > wanted:
        rows = np.random.default_rng(seed).choice(len(vectors), wanted, replace=False)
        vectors = vectors[np.sort(rows)]
    clusters = min(clusters, len(vectors))
    model = KMeans(clusters, init="k-means++", n_init=1, max_iter=100, random_state=seed)
    # Threads add up partial sums in an order that varies, and with it the last bits and, rarely,
    # a document's cluster; on samples of this size they also cost more than they bring.
    # Fewer distinct vectors than clusters is handled below, not worth a warning.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(vectors)
    centroids = np.asarray(model.cluster_centers_, np.float32)
    return centroids[np.unique(nearest(vectors, centroids))]


def nearest(
    vectors: Float32[np.ndarray, "docs embed"], centroids: Float32[np.ndarray, "clusters embed"]
) -> Int32[np.ndarray, " docs"]:
    """int32[docs]: the centroid at the least Euclidean distance from each vector."""
    # |v - c|² = |v|² - 2 (v·c - |c|²/2), and |v|² is the same for all centroids.
    half = 0.5 * np.einsum("ke,ke->k", centroids, centroids)
    out = np.empty(len(vectors), np.int32)
    step = max(1, _CHUNK // max(1, len(centroids)))
    for start in range(0, len(vectors), step):
        scores = vectors[start : start + step] @ centroids.T - half
        out[start : start + step] = scores.argmax(axis=1)
    return out
