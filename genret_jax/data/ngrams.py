"""SeqIO tasks of method `ngram`: a query, or a piece of a document -> an n-gram of the document.

For each view of documents (see `genret_jax.ngram.settings`) there are two tasks: VIEW_retrieval,
whose inputs are the train queries, and VIEW_indexing, whose inputs are pieces of the documents as
long as queries are, or titles. A target is a window of the view's text; as in SEAL (Bevilacqua et
al. 2022), several are drawn for an input, and ones that share words with it are preferred. The
view is told by a mark that the input begins with.

Everything is drawn before SeqIO reads it, from one seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import seqio
import tensorflow as tf
from jaxtyping import Bool, Float, Int

from genret_jax.data.examples import Ragged, TrainingExamples
from genret_jax.data.tasks import add_task, drop_words, span_lengths
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.vocabularies import EOS, UNK

# Of a window that shares words of so much inverse document frequency (in nats) with the input, the
# chance grows by a factor of e.
_PREFERENCE = 2.0
_SHARES = {"text": 10.0, "title": 3.0, "queries": 10.0}  # of the mixture: SEAL's spans and titles


@dataclasses.dataclass(frozen=True)
class ViewTexts:
    """What the documents are known by in one view.

    Attributes:
      name: of the view.
      mark: token that stands for it.
      texts: token sequences.
      owners: int32[texts], ascending: the document of each.
      whole: whether a target is all of a text, and its end.
    """

    name: str
    mark: int
    texts: Ragged
    owners: np.ndarray
    whole: bool = False

    def of(self, document: int) -> Iterator[np.ndarray]:
        """The texts of one document."""
        # Keys of another type would have all owners converted, for every call.
        keys = np.array([document, document + 1], self.owners.dtype)
        first, last = np.searchsorted(self.owners, keys).tolist()
        return (self.texts[i] for i in range(first, last))


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How targets are drawn.

    Attributes:
      length: tokens of a target, at most.
      idf: float[pieces], what sharing a piece counts.
      starts_word: bool[pieces]; a target begins with such a piece where it can.
    """

    length: int
    idf: Float[np.ndarray, " pieces"]
    starts_word: Bool[np.ndarray, " pieces"]

    def windows(
        self,
        tokens: Int[np.ndarray, " text"],
        shared: Int[np.ndarray, " input"],
        count: int,
        rng: np.random.Generator,
    ) -> list[np.ndarray]:
        """`count` windows of a text, those that share tokens with an input preferred.

        None of a text without a known token.
        """
        length = min(self.length, len(tokens))
        places = len(tokens) - length + 1
        if length < 1:
            return []
        gain = np.where(np.isin(tokens, shared), self.idf[tokens], 0.0)
        sums = np.concatenate([[0.0], np.cumsum(gain)])
        worth = (sums[length:] - sums[:places]) / _PREFERENCE
        unknown = np.concatenate([[0], np.cumsum(tokens == UNK)])
        possible = unknown[length:] == unknown[:places]
        if (possible & self.starts_word[tokens[:places]]).any():
            possible &= self.starts_word[tokens[:places]]
        if not possible.any():
            return []
        chance = np.where(possible, np.exp(worth - worth[possible].max()), 0.0)
        chosen = rng.choice(places, count, p=chance / chance.sum())
        return [tokens[i : i + length] for i in chosen.tolist()]


def piece_idf(examples: TrainingExamples, pieces: int) -> Float[np.ndarray, " pieces"]:
    """log((documents + 1) / (documents with the piece + 1)), in nats."""
    documents = len(examples.document_rows)
    held = np.zeros(pieces)
    for i in range(documents):
        held[np.unique(np.concatenate([examples.titles[i], examples.bodies[i]]))] += 1
    return np.log((documents + 1) / (held + 1))


def register_ngrams(
    name: str,
    examples: TrainingExamples,
    views: Sequence[ViewTexts],
    vocabulary: SeqioVocabulary,
    *,
    drawing: Drawing,
    spans: int = 10,
    pieces: int = 8,
    indexing_share: float = 0.3,
    title_share: float = 0.3,
    word_dropout: float = 0.0,
    seed: int = 0,
) -> str:
    """Registers `NAME_VIEW_retrieval` and `NAME_VIEW_indexing` and the mixture `NAME`.

    Args:
      name: of the mixture.
      examples: queries and documents.
      views: of the documents.
      vocabulary: for both features.
      drawing: how targets are drawn.
      spans: targets a train query.
      pieces: of a document, each with one target.
      indexing_share: of the mixture; 1 without train queries.
      title_share: of titles among the pieces.
      word_dropout: share of pieces left out of an input at random.
      seed: of all that is drawn.

    Returns:
      The name of the mixture.
    """
    features = {
        "inputs": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32),
        "targets": seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32),
    }
    share = indexing_share if len(examples.queries) else 1.0
    rates = []
    for view in views:
        finish = [functools.partial(_add_mark, mark=view.mark)]
        if word_dropout:
            finish.insert(0, functools.partial(drop_words, rate=word_dropout))
        sources = {
            "retrieval": (1 - share, _of_queries(examples, view, drawing, spans, seed)),
            "indexing": (
                share,
                _of_pieces(examples, view, drawing, pieces, title_share, seed),
            ),
        }
        for kind, (part, pairs) in sources.items():
            inputs, targets = _ragged(pairs) if part else (Ragged.of([]), Ragged.of([]))
            if len(inputs):
                task = f"{name}_{view.name}_{kind}"
                finished = [*finish, seqio.preprocessors.append_eos_after_trim]
                add_task(task, _source(inputs, targets), finished, features, len(inputs))
                rates.append((task, part * _SHARES[view.name]))
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, rates)
    return name


_Pairs = Iterator[tuple[np.ndarray, np.ndarray]]


def _of_queries(
    examples: TrainingExamples, view: ViewTexts, drawing: Drawing, spans: int, seed: int
) -> _Pairs:
    """(query, target) of a view, `spans` for each train pair; one where the target is a title."""
    rng = np.random.default_rng([seed, 31])
    for i in range(len(examples.queries)):
        query = examples.queries[i]
        for target in _targets(view, int(examples.query_documents[i]), query, drawing, spans, rng):
            yield query, target


def _of_pieces(
    examples: TrainingExamples,
    view: ViewTexts,
    drawing: Drawing,
    count: int,
    title_share: float,
    seed: int,
) -> _Pairs:
    """(piece of a document, target) of a view, `count` pieces a document."""
    rng = np.random.default_rng([seed, 37])
    lengths = span_lengths(examples)
    for document in range(len(examples.document_rows)):
        title, body = examples.titles[document], examples.bodies[document]
        for _ in range(count):
            piece = title
            if len(body) and not (len(title) and rng.random() < title_share):
                length = int(rng.choice(lengths))
                start = int(rng.integers(max(len(body) - length, 0) + 1))
                piece = body[start : start + length]
            if len(piece):
                for target in _targets(view, document, piece, drawing, 1, rng):
                    yield piece, target


def _targets(
    view: ViewTexts,
    document: int,
    shared: np.ndarray,
    drawing: Drawing,
    count: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    texts = [text for text in view.of(document) if len(text)]
    if not texts:
        return []
    if view.whole:
        return [np.append(text, EOS)[: drawing.length] for text in texts if (text != UNK).all()]
    # Another text than the input itself, where there is one: a query says nothing of itself.
    others = [text for text in texts if not np.array_equal(text, shared)] or texts
    if len(others) == 1:
        return drawing.windows(others[0], shared, count, rng)
    chosen = rng.integers(len(others), size=count).tolist()
    return [window for i in chosen for window in drawing.windows(others[i], shared, 1, rng)]


def _ragged(pairs: _Pairs) -> tuple[Ragged, Ragged]:
    inputs, targets = [], []
    for given, target in pairs:
        inputs.append(given)
        targets.append(target)
    return _joined(inputs), _joined(targets)


def _joined(arrays: list[np.ndarray]) -> Ragged:
    lengths = np.array([len(a) for a in arrays], np.int64)
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    return Ragged(values.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))


def _source(inputs: Ragged, targets: Ragged) -> seqio.FunctionDataSource:
    read = {
        name: (tf.constant(part.values), tf.constant(part.offsets))
        for name, part in (("inputs", inputs), ("targets", targets))
    }

    def example(i: tf.Tensor) -> dict[str, tf.Tensor]:
        return {name: values[at[i] : at[i + 1]] for name, (values, at) in read.items()}

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        return tf.data.Dataset.range(len(inputs)).map(example)

    return seqio.FunctionDataSource(dataset_fn, splits=("train",))


@seqio.map_over_dataset
def _mark_first(example: dict[str, tf.Tensor], *, mark: int) -> dict[str, tf.Tensor]:
    return {**example, "inputs": tf.concat([[mark], example["inputs"]], 0)}


def _add_mark(dataset: tf.data.Dataset, *, mark: int) -> tf.data.Dataset:
    """The view's mark before each input, where no word dropout can take it away."""
    return _mark_first(dataset, mark=mark)
