"""Small corpora and their docids, shared by the tests of docids."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from genret_jax.corpus import Document
from genret_jax.docids.build import build_docids

WORDS = ["seam", "weld", "torch", "gas", "pipe", "the", "C", "löten", "標籤", "7", "3,000"]
TEXT = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)
CORPUS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=12).map(
    lambda pairs: [Document(f"d{i}", title, text) for i, (title, text) in enumerate(pairs)]
)


def corpus_of(*texts):
    return [Document(f"d{i}", "", text) for i, text in enumerate(texts)]


def many_documents(count=300, seed=0):
    rng = np.random.default_rng(seed)
    pool = [f"w{i}" for i in range(200)]
    return corpus_of(*(" ".join(rng.choice(pool, 12)) for _ in range(count)))


def build(kind, documents, **kw):
    return build_docids(kind, documents, pieces=str.split, **kw)


def texts_of(table):
    return [table.text(row) for row in range(table.rows)]
