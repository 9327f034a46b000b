"""Pseudo-queries: what a generator, trained on the train queries, would ask of every document.

A document that no train query is about is known by its own words alone; pseudo-queries say how it
would be asked for (doc2query, Nogueira et al. 2019; for generative retrieval DSI-QG, Zhuang et al.
2022).
"""

from __future__ import annotations

from genret_jax.pseudo_queries.files import (
    PseudoQuery,
    read_pseudo_queries,
    write_pseudo_queries,
)

__all__ = ["PseudoQuery", "read_pseudo_queries", "write_pseudo_queries"]
