"""Method `glen`: identifiers that the model gives the documents itself, found in a trie of them.

A query is decoded once, fed with states and not with tokens, and a beam search over the identifiers
adds up the logits. Documents of one identifier stand in the order of the cosine between the query's
logits and their own, at its tokens.

retriever/ holds spiece.model, vocabulary.json, model.safetensors, docids/ and trie/ (as learned),
weights.npy (the documents' logits at their tokens), ids.json and glen.json, besides what
`genret_jax.searchers` writes.
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
from jaxtyping import Float32, Int

from genret_jax.baselines.protocol import Hit
from genret_jax.corpus import Corpus
from genret_jax.device_trie import DeviceTrie
from genret_jax.docids.table import DocidTable
from genret_jax.documents import descending
from genret_jax.errors import UserError
from genret_jax.modeling.glen import GlenModel
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import Params, RetrievalModel
from genret_jax.ranking import batch_sizes, batched
from genret_jax.trie import Trie, build_trie
from genret_jax.vocabularies import Vocabulary
from genret_jax.weights import load_weights, save_weights

GROUP = "generative"
_ABOUT, _IDS, _WEIGHTS = "glen.json", "ids.json", "weights.npy"
_BEAM = 100  # identifiers, unless more documents are wanted


@dataclasses.dataclass(frozen=True)
class Learned:
    """Identifiers as the model gives them to the documents.

    Attributes:
      table: one row a document, all of one length; equal rows are kept.
      trie: of them.
      weights: float32[documents, steps], a document's logits at its own tokens.
    """

    table: DocidTable
    trie: Trie
    weights: Float32[np.ndarray, "documents steps"]

    @functools.cached_property
    def device(self) -> DeviceTrie:
        return self.trie.on_device()

    @classmethod
    def of(
        cls,
        tokens: Int[np.ndarray, "documents steps"],
        weights: Float32[np.ndarray, "documents steps"],
        labels: Sequence[str],
    ) -> Learned:
        """Identifiers of local docid ids over the labels that the model writes."""
        documents, steps = tokens.shape
        lengths = np.full(documents, steps, np.int32)
        table = DocidTable.from_array(tokens, lengths, np.arange(documents), labels, "learned", {})
        return cls(table, build_trie(table), weights)


@dataclasses.dataclass(frozen=True)
class GlenRanker:
    """Queries -> documents, for any parameters and identifiers.

    Attributes:
      model: decodes queries.
      vocabulary: of their text.
      input_length: encoder tokens a query is cut and padded to.
      order: place of each document among all ids in descending order, for what is equal otherwise.
    """

    model: GlenModel
    vocabulary: Vocabulary
    input_length: int
    order: np.ndarray

    @functools.cached_property
    def _search(self) -> Any:
        return jax.jit(self.model.search, static_argnames="beam")

    def rank(
        self,
        params: Params,
        learned: Learned,
        queries: Sequence[str],
        *,
        k: int,
        beam: int,
        trie: DeviceTrie | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Positions and scores of at most k documents of each query, best first.

        A score is log p of the identifier, in nats. Members of one identifier, and whatever else
        would be equal, follow in steps of the last bit of a float64, so that the scores alone
        give the order.

        Args:
          params, learned: of one another.
          queries: any number of texts.
          k, beam: documents a query, and identifiers that the search keeps.
          trie: that of `learned` on the device, where it is there.
        """
        trie = learned.device if trie is None else trie
        beam = min(beam, len(learned.weights))
        out: list[tuple[np.ndarray, np.ndarray]] = []
        sizes = batch_sizes(beam, self.model.model.docids.size)
        encode = functools.partial(self.vocabulary.encode_batch, length=self.input_length)
        for count, tokens in batched(queries, encode, sizes):
            found, weights = self._search(params, tokens, trie, beam=beam)
            rows, scores, weights = (np.asarray(x) for x in (found.row, found.scores, weights))
            out += [self._members(rows[i], scores[i], weights[i], learned, k) for i in range(count)]
        return out

    def _members(
        self, rows: np.ndarray, scores: np.ndarray, weights: np.ndarray, learned: Learned, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The documents of the rows of one query's beam, the identifiers' best first."""
        trie, valid = learned.trie, rows >= 0
        rows, scores, weights = rows[valid], scores[valid], weights[valid]
        counts = trie.row_offsets[rows + 1] - trie.row_offsets[rows]
        of = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = trie.row_documents[trie.row_offsets[rows][of] + within]
        nearness = cosines(weights[of], learned.weights[positions])
        best = np.lexsort((self.order[positions], -nearness, of))[:k]
        # Two identifiers of one score are apart already, the better one of the beam first.
        return positions[best], descend(scores[of][best].astype(np.float64))


def cosines(
    a: Float32[np.ndarray, "some steps"], b: Float32[np.ndarray, "some steps"]
) -> Float32[np.ndarray, " some"]:
    """Row by row; 0 with a zero row."""
    lengths = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    return (a * b).sum(1) / np.where(lengths > 0, lengths, 1.0)


def descend(scores: np.ndarray) -> np.ndarray:
    """The scores, float64 and not ascending, with each below the one before it by a bit at least.

    Example:
      >>> descend(np.array([1.0, 1.0, 0.0])).tolist()
      [1.0, 0.9999999999999999, 0.0]
    """
    out = scores.copy()
    for i in range(1, len(out)):
        out[i] = min(out[i], np.nextafter(out[i - 1], -np.inf))
    return out


@dataclasses.dataclass(frozen=True)
class GlenSearcher:
    """The model, and the identifiers that it gave; a `Searcher`.

    Attributes:
      ranker, params, learned: what ranks.
      ids: document ids by position.
    """

    ranker: GlenRanker
    params: Params
    learned: Learned
    ids: Sequence[str]
    name: str = "glen"

    def search(self, queries: Sequence[str], *, k: int) -> list[list[Hit]]:
        """The best `k` documents of each query; none for one without words.

        Raises:
          UserError: k below 1.
        """
        if k < 1:
            raise UserError(f"glen: k = {k}; give 1 or more")
        asked = [query for query in queries if query.strip()]
        found = self.ranker.rank(self.params, self.learned, asked, k=k, beam=max(k, _BEAM))
        hits = iter(
            [
                Hit(self.ids[position], score, rank)
                for rank, (position, score) in enumerate(
                    zip(positions.tolist(), scores.tolist(), strict=True), 1
                )
            ]
            for positions, scores in found
        )
        return [next(hits) if query.strip() else [] for query in queries]


def fit(corpus: Corpus, folder: Path, work: Any) -> dict[str, Any]:
    """Trains both phases and writes the model with its identifiers; see `genret_jax.searchers`.

    Settings: `pairwise`, `pointwise`, `cosine` (see `GlenWeights`), and `epoch_steps`, steps that
    count as a pass over the train queries, by which the temperature falls; 0 for what it takes.
    """
    from genret_jax.stages.glen import GlenSettings, check_recipe, train_glen  # brings SeqIO

    settings = GlenSettings(**work.settings)
    check_recipe(work.recipe)
    made = train_glen(corpus, work.split, work.recipe, work.run, work.clock, settings)
    for name in ("spiece.model", "vocabulary.json"):
        shutil.copyfile(work.run / "index" / name, folder / name)
    curves = work.run / "ranking" / "curves.png"
    if curves.exists():
        shutil.copyfile(curves, work.run / "curves.png")
    save_weights(made.result.params, folder / "model.safetensors")
    made.learned.table.save(folder / "docids")
    made.learned.trie.save(folder / "trie")
    np.save(folder / _WEIGHTS, made.learned.weights)
    ids = [document.id for document in corpus.documents]
    (folder / _IDS).write_text(json.dumps(ids, ensure_ascii=False), "utf-8")
    about = {
        "network": dataclasses.asdict(made.model.model.config),
        "input_length": made.input_length,
        "steps": made.model.steps,
    }
    (folder / _ABOUT).write_text(json.dumps(about, indent=1))
    return {
        "dev": made.result.dev,
        "parameters": sum(int(x.size) for x in jax.tree.leaves(made.result.params)),
        "training": {
            "pairs": len(work.split.pairs),
            "dev_queries": len(work.split.dev_queries),
            "steps": made.first.steps + made.result.steps,
            "best_step": made.result.best_step,
        },
        "docids": made.docids,
        "first_stage": {"steps": made.first.steps, "dev": made.first.dev},
        "second_stage": made.report,
    }


def load(folder: Path) -> GlenSearcher:
    """Opens what `fit` left.

    Raises:
      UserError: it is not whole.
    """
    try:
        about = json.loads((folder / _ABOUT).read_text("utf-8"))
        ids = json.loads((folder / _IDS).read_text("utf-8"))
        config, steps = T5Config(**about["network"]), int(about["steps"])
        length = int(about["input_length"])
        weights = np.load(folder / _WEIGHTS)
        if weights.shape != (len(ids), steps):
            raise ValueError(f"weights of shape {weights.shape} for {len(ids)} documents")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no whole glen retriever here ({error!r}); fit again") from None
    vocabulary = Vocabulary.load(folder)
    model = GlenModel(RetrievalModel(config, vocabulary.docids), steps)
    learned = Learned(DocidTable.load(folder / "docids"), Trie.load(folder / "trie"), weights)
    params = jax.tree.map(jax.numpy.asarray, load_weights(folder / "model.safetensors"))
    ranker = GlenRanker(model, vocabulary, length, descending(ids))
    return GlenSearcher(ranker, params, learned, ids)
