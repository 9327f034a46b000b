"""Method `dense`: a dual encoder, and exact inner products with all vectors of all documents.

A document is as near to a query as its nearest view is (a piece of its text, or a train query). No
index is approximate: with FAISS installed its flat index does the products, without it numpy does.

retriever/ holds spiece.model, vocabulary.json, model.safetensors (the encoder alone), vectors.*,
ids.json and dense.json, besides what `genret_jax.searchers` writes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32

from genret_jax.baselines.protocol import Hit, best_hits
from genret_jax.corpus import Corpus
from genret_jax.docids.features import unit_length
from genret_jax.documents import descending
from genret_jax.errors import UserError
from genret_jax.indexing import NO_DOCIDS
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import Params, RetrievalModel
from genret_jax.ranking import BATCH_SIZES, batched
from genret_jax.vectors import DocumentVectors
from genret_jax.vocabularies import Vocabulary
from genret_jax.weights import load_weights, save_weights

_ABOUT, _IDS = "dense.json", "ids.json"
_BLOCK_BYTES = 64 << 20  # of vectors multiplied at a time
_IN_MEMORY_BYTES = 4 << 30  # of float32 vectors that are kept between searches


class ExactSearch:
    """The nearest documents by inner product, each by its nearest view.

    Args:
      vectors: of the views of all documents.
      faiss: whether FAISS does the products; by default where it is installed.
    """

    def __init__(self, vectors: DocumentVectors, *, faiss: bool | None = None):
        self._vectors, self._faiss = vectors, _has_faiss() if faiss is None else faiss
        self._views = int(vectors.bounds[-1, 0])

    def scores(
        self, queries: Float32[np.ndarray, "queries embed"]
    ) -> Float32[np.ndarray, "queries documents"]:
        """Of every document; -inf for one without a view. By numpy, block by block."""
        begins = self._vectors.bounds[:, 0]
        out = np.full((len(queries), len(self._vectors)), -np.inf, np.float32)
        for first, last in self._blocks:
            rows = self._rows(int(begins[first]), int(begins[last]))
            some = first + np.flatnonzero(np.diff(begins[first : last + 1]))
            if len(some):
                products = queries @ rows.T
                starts = begins[some] - begins[first]
                out[:, some] = np.maximum.reduceat(products, starts, axis=1)
        return out

    def nearest(
        self, queries: Float32[np.ndarray, "queries embed"], k: int
    ) -> list[tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]]:
        """Positions and scores of at least the best k documents, in no order.

        Where more than k documents are as good as the k-th, all of them are there as far as the
        products tell.
        """
        if self._faiss:
            return self._by_views(queries, k)
        found = []
        for scores in self.scores(queries):
            least = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
            best = np.flatnonzero((scores >= least) & np.isfinite(scores)).astype(np.int32)
            found.append((best, scores[best]))
        return found

    def _by_views(
        self, queries: Float32[np.ndarray, "queries embed"], k: int
    ) -> list[tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]]:
        """The documents of the nearest views, of so many that k documents are among them."""
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        asked, count = np.arange(len(queries)), min(self._views, 4 * k)
        while len(asked):
            scores, rows = self._flat.search(np.ascontiguousarray(queries[asked]), count)
            left = []
            for query, values, owners in zip(
                asked.tolist(), scores, self._owners[rows], strict=True
            ):
                documents, first = np.unique(owners, return_index=True)  # views come best first
                # The last view may be as good as ones beyond it; those of a better score are whole.
                if count == self._views or (values[first] > values[-1]).sum() >= k:
                    best = values[first].astype(np.float32)
                    found[query] = documents.astype(np.int32), best
                else:
                    left.append(query)
            asked, count = np.array(left, np.int64), min(self._views, 4 * count)
        return [found[query] for query in range(len(queries))]

    @functools.cached_property
    def _owners(self) -> np.ndarray:
        return np.repeat(np.arange(len(self._vectors)), np.diff(self._vectors.bounds[:, 0]))

    @functools.cached_property
    def _flat(self) -> Any:
        import faiss

        index = faiss.IndexFlatIP(self._vectors.values.shape[1])
        for first, last in self._blocks:
            begins = self._vectors.bounds[[first, last], 0]
            index.add(np.ascontiguousarray(self._rows(*begins.tolist())))
        return index

    @functools.cached_property
    def _blocks(self) -> list[tuple[int, int]]:
        """Ranges of documents whose views are multiplied together."""
        begins = self._vectors.bounds[:, 0]
        most = max(1, _BLOCK_BYTES // (4 * self._vectors.values.shape[1]))
        cuts = [0]
        while cuts[-1] < len(self._vectors):
            last = int(np.searchsorted(begins, begins[cuts[-1]] + most, side="right")) - 1
            cuts.append(min(len(self._vectors), max(last, cuts[-1] + 1)))
        return list(zip(cuts[:-1], cuts[1:], strict=True))

    def _rows(self, begin: int, end: int) -> np.ndarray:
        if self._float32 is not None:
            return self._float32[begin:end]
        return self._vectors.rows(slice(begin, end))

    @functools.cached_property
    def _float32(self) -> np.ndarray | None:
        """All vectors, where they are few enough to be kept as they are multiplied."""
        if self._faiss or 4 * self._vectors.values.size > _IN_MEMORY_BYTES:
            return None
        return self._vectors.rows(slice(self._views))


@dataclasses.dataclass(frozen=True)
class QueryEncoder:
    """Queries -> vectors, of length one where similarity is the cosine."""

    model: RetrievalModel
    vocabulary: Vocabulary
    input_length: int
    similarity: str

    @functools.cached_property
    def _encode(self) -> Any:
        return jax.jit(self.model.vectors)

    def __call__(
        self, params: Params, queries: Sequence[str]
    ) -> Float32[np.ndarray, "queries embed"]:
        parts = [np.zeros((0, self.model.config.embed_dim), np.float32)]
        encode = functools.partial(self.vocabulary.encode_batch, length=self.input_length)
        for count, tokens in batched(queries, encode):
            vectors = np.asarray(self._encode(params, tokens), np.float32)[:count]
            parts.append(unit_length(vectors) if self.similarity == "cosine" else vectors)
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class DenseSearcher:
    """A dual encoder and the vectors of its documents; a `Searcher`.

    Attributes:
      encoder, params: of queries.
      exact: over the documents' vectors.
      ids: document ids by position.
      order: place of each document among all ids in descending order.
    """

    encoder: QueryEncoder
    params: Params
    exact: ExactSearch
    ids: Sequence[str]
    order: np.ndarray
    name: str = "dense"

    def search(self, queries: Sequence[str], *, k: int) -> list[list[Hit]]:
        """The best `k` documents of each query; none for one without words.

        Equal scores are ordered by id descending.

        Raises:
          UserError: k below 1.
        """
        if k < 1:
            raise UserError(f"dense: k = {k}; give 1 or more")
        asked = [query for query in queries if query.strip()]
        found: list[list[Hit]] = []
        for start in range(0, len(asked), BATCH_SIZES[-1]):
            vectors = self.encoder(self.params, asked[start : start + BATCH_SIZES[-1]])
            for documents, scores in self.exact.nearest(vectors, k):
                everyone = np.full(len(self.ids), -np.inf, np.float32)
                everyone[documents] = scores
                found.append(best_hits(everyone, documents, self.ids, self.order, k=k))
        results = iter(found)
        return [next(results) if query.strip() else [] for query in queries]


def fit(corpus: Corpus, folder: Path, work: Any) -> dict[str, Any]:
    """Trains the encoder and writes it with the documents' vectors; see `genret_jax.searchers`."""
    from genret_jax.stages.dense import dense_materials, train_dense  # brings SeqIO

    config = work.recipe.contrastive
    for name, found, wanted in (
        ("DocidConfig.kind", work.recipe.docids.kind, NO_DOCIDS),
        ("ContrastiveConfig.vector", config.vector, "encoder_mean"),
        ("ContrastiveConfig.generation", config.generation, 0),
        ("ContrastiveConfig.prefix", config.prefix, 0),
        ("ContrastiveConfig.retrieval", config.retrieval, 1),
        ("SearcherConfig.settings", dict(work.settings), {}),
    ):
        if found != wanted:
            raise UserError(
                f"method {work.recipe.method} has no docids and one loss: {name} is {found!r}, "
                f"but must be {wanted!r}; leave out what sets it"
            )
    if work.recipe.train.init:
        raise UserError(
            f"method {work.recipe.method} does not begin with a pretrained T5 yet; leave out --init"
        )
    materials = dense_materials(corpus, work.split, work.recipe, work.run / "index")
    made = train_dense(materials, work.run / "training", work.clock)
    curves = work.run / "training" / "curves.png"
    if curves.exists():
        shutil.copyfile(curves, work.run / "curves.png")
    for name in ("spiece.model", "vocabulary.json"):
        shutil.copyfile(work.run / "index" / name, folder / name)
    save_weights(made.result.params, folder / "model.safetensors")
    made.vectors.save(folder)
    (folder / _IDS).write_text(json.dumps(materials.document_ids, ensure_ascii=False), "utf-8")
    about = {
        "network": dataclasses.asdict(materials.model.config),
        "input_length": materials.input_length,
        "similarity": config.similarity,
    }
    (folder / _ABOUT).write_text(json.dumps(about, indent=1))
    return {
        "dev": made.result.dev,
        "parameters": sum(int(x.size) for x in jax.tree.leaves(made.result.params)),
        "training": {
            "pairs": len(work.split.pairs),
            "dev_queries": len(work.split.dev_queries),
            "steps": made.result.steps,
            "best_step": made.result.best_step,
        },
        "second_stage": made.report,
    }


def load(folder: Path) -> DenseSearcher:
    """Opens what `fit` left.

    Raises:
      UserError: it is not whole.
    """
    try:
        about = json.loads((folder / _ABOUT).read_text("utf-8"))
        ids = json.loads((folder / _IDS).read_text("utf-8"))
        config = T5Config(**about["network"])
        length, similarity = int(about["input_length"]), str(about["similarity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no whole dense retriever here ({error!r}); fit again") from None
    vocabulary = Vocabulary.load(folder)
    model = RetrievalModel(config, vocabulary.docids, vector="encoder_mean")
    params = jax.tree.map(jax.numpy.asarray, load_weights(folder / "model.safetensors"))
    vectors = DocumentVectors.load(folder, documents=len(ids), width=config.embed_dim)
    encoder = QueryEncoder(model, vocabulary, length, similarity)
    return DenseSearcher(encoder, params, ExactSearch(vectors), ids, descending(ids))


def _has_faiss() -> bool:
    import importlib.util

    return importlib.util.find_spec("faiss") is not None
