"""Documents to tell a query's answer apart from: the negatives of the second training stage.

- prefix negatives: documents whose docid begins as that of a document does, so that constrained
  decoding cannot part the two before the first token in which they differ;
- retrieved negatives: what a searcher finds for a train query and nobody judged relevant.

Both are tables of document positions, one row a document or query, padded with -1 at the end.
"""

from __future__ import annotations

from genret_jax.negatives.mined import Positives, Search, bm25_search, known_positives, mine
from genret_jax.negatives.prefix import Depth, prefix_negatives
from genret_jax.negatives.tables import Negatives, draw

__all__ = [
    "Depth",
    "Negatives",
    "Positives",
    "Search",
    "bm25_search",
    "draw",
    "known_positives",
    "mine",
    "prefix_negatives",
]
