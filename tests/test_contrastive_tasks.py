"""Stage 2 through SeqIO against the native batches: same examples, same features, same loss."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from tiny import tiny_corpus

from genret_jax.configs import ContrastiveConfig
from genret_jax.data.batches import Batches, materialise
from genret_jax.data.contrastive import (
    ContrastiveBatches,
    DocumentSide,
    Questions,
    with_documents,
)
from genret_jax.data.contrastive_tasks import (
    DOCUMENT_FEATURES,
    ContrastiveFeatureConverter,
    document_lengths,
    register_contrastive,
)
from genret_jax.data.examples import make_examples
from genret_jax.data.tasks import register
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.docids.table import DocidTable
from genret_jax.modeling.contrastive import JointWeights
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.modeling.ranking_model import RankingModel
from genret_jax.negatives import Negatives, known_positives
from genret_jax.vocabularies import Vocabulary, train_text_model

# Of several lengths; the last two documents share one.
DOCIDS = [[2, 3], [2, 4], [2, 5, 3], [3, 3], [3, 4], [4], [5, 2], [5, 2]]
PREFIX, RETRIEVED = 2, 3
PLAIN = {"inputs": 12, "targets": 4}
SHARE = 0.25


class World:
    """The tiny collection, ready for both ways."""

    def __init__(self):
        corpus = tiny_corpus()
        labels = ("<pad>", "</s>", "a", "b", "c", "d")
        table = DocidTable.from_sequences(DOCIDS, range(8), labels, "test", {})
        texts = [d.whole for d in corpus.documents] + list(corpus.queries.values())
        self.vocabulary = Vocabulary(train_text_model(texts, size=150), table.vocab_size)
        pairs = [*corpus.pairs("train"), ("lifts job", 4)]
        self.examples = make_examples(corpus.documents, pairs, self.vocabulary, table)
        self.positives = known_positives(pairs)
        self.questions = Questions.of(self.positives, corpus.documents)
        config = ContrastiveConfig(document_length=8, pieces=3, queries=4)
        self.side = DocumentSide.of(self.examples, self.positives, self.vocabulary.docids, config)
        rng = np.random.default_rng(0)
        self.negatives = Negatives(
            # Documents without, with too few, and with more than enough.
            prefix=np.array([[1, 2, 5], [0, 2, -1], [4, -1, -1], *[[-1] * 3] * 5], np.int32),
            retrieved=rng.integers(-1, 8, (len(self.questions.texts), 5)).astype(np.int32),
            digest="",
            source="test",
            depth="deepest",
        )
        self.negatives.retrieved[:] = -np.sort(-self.negatives.retrieved, axis=1)
        self.lengths = {
            **PLAIN,
            **document_lengths(self.side, self.questions, negatives=PREFIX + RETRIEVED),
        }

    def register(self, name):
        return register_contrastive(
            name,
            self.examples,
            SeqioVocabulary(self.vocabulary),
            self.side,
            self.questions,
            self.positives,
            self.negatives,
            prefix=PREFIX,
            retrieved=RETRIEVED,
            indexing_share=SHARE,
        )

    def register_plain(self, name):
        vocabulary = SeqioVocabulary(self.vocabulary)
        return register(name, self.examples, vocabulary, indexing_share=SHARE)

    def native(self, pools, batch_size=8):
        return ContrastiveBatches(
            Batches(pools, batch_size=batch_size, seed=0, buckets=(PLAIN["inputs"],)),
            self.side,
            self.questions,
            self.negatives,
            prefix=PREFIX,
            retrieved=RETRIEVED,
            seed=0,
        )


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def pools(world):
    """The contrastive tasks as arrays, one pool each; indexing twice over."""
    return _by_kind(
        materialise(
            world.register("contrast"),
            lengths=world.lengths,
            passes={"indexing": 2},
            seed=3,
            converter=ContrastiveFeatureConverter(),
        )
    )


def _by_kind(pools):
    return {pool.name.rsplit("_", 1)[1]: pool for pool in pools}


@pytest.fixture(scope="module")
def native_pools(world):
    plain = materialise(
        world.register_plain("native"), lengths=PLAIN, passes={"indexing": 2}, seed=3
    )
    return _by_kind(with_documents(pool, world.examples, world.positives) for pool in plain)


def test_the_mixture_is_the_plain_one_with_more_features(world, pools, native_pools):
    assert {kind: pool.rate for kind, pool in pools.items()} == {
        "retrieval": 1 - SHARE,
        "indexing": SHARE,
    }
    for kind, native in native_pools.items():
        pool = pools[kind]
        assert pool.rate == native.rate and pool.name == f"contrast_{kind}"
        for name in native.arrays.keys() - {"document_index", "question_index"}:
            assert (pool.arrays[name] == native.arrays[name]).all(), name
    assert not any("plain" in name for name in seqio.TaskRegistry.names() if "contrast" in name)


def test_every_example_has_its_document_and_what_answers_it(world, pools, native_pools):
    side, questions = world.side, world.questions
    for kind, native in native_pools.items():
        arrays, document = pools[kind].arrays, native.arrays["document_index"]
        assert (arrays["document_index"] == document).all()
        assert (arrays["document_row"] == side.row[document]).all()
        _check_views(side.views, document, arrays["document_tokens"], native)
        assert (arrays["document_docids"] == side.docids[document]).all()
        relevant = questions.relevant[native.arrays["question_index"]]
        assert (arrays["relevant_index"] == relevant).all()
    assert (side.row[6] == side.row[7]) and (world.questions.relevant >= 0).sum(1).max() == 2


def test_negatives_are_drawn_from_the_tables(world, pools, native_pools):
    side = world.side
    for kind, native in native_pools.items():
        arrays, known = pools[kind].arrays, native.arrays
        index = arrays["negative_document_index"]
        for row, document, question in zip(
            index.tolist(), known["document_index"], known["question_index"], strict=True
        ):
            _check_drawn(row[:PREFIX], world.negatives.prefix[document])
            _check_drawn(row[PREFIX:], world.negatives.retrieved[question])
        for column in range(index.shape[1]):
            tokens = arrays["negative_document_tokens"][:, column]
            _check_views(side.views, np.maximum(index[:, column], 0), tokens, native)
        for name in ("row", "docids"):  # also at padding, as the native batches have it
            assert (arrays[f"negative_document_{name}"] == getattr(side, name)[index]).all()


def _check_views(views, document, tokens, native):
    """Each is a view of its document, and no train query is its own question's positive."""
    drawn = set()
    for of, row, question in zip(document, tokens, native.arrays["question_index"], strict=True):
        here = np.flatnonzero((views.tokens == row).all(1) & (views.owners == of))
        assert len(here) and not (views.questions[here] == question).any()
        drawn |= set(here.tolist())
    kinds = {bool(views.questions[row] >= 0) for row in drawn}
    assert len(document) < 20 or (kinds == {True, False} and len(drawn) > 10), "all are drawn"


def _check_drawn(row, table):
    """As many of the entries as there are, each once for every time that it is there."""
    entries = [i for i in row if i >= 0]
    assert row == entries + [-1] * (len(row) - len(entries))
    there = [i for i in table.tolist() if i >= 0]
    assert len(entries) == min(len(row), len(there))
    assert all(entries.count(i) <= there.count(i) for i in entries)


def test_draws_change_with_the_epoch_and_follow_the_seed(world, pools):
    def drawn(seed):
        found = materialise(
            "contrast",
            lengths=world.lengths,
            passes={"indexing": 20},
            seed=seed,
            converter=ContrastiveFeatureConverter(),
        )
        pool = _by_kind(found)["indexing"]
        return pool.arrays["negative_document_index"].reshape(20, 8, -1)

    one, same, other = drawn(3), drawn(3), drawn(4)
    assert (one == same).all() and (one != other).any()
    assert (one[:2].reshape(16, -1) == pools["indexing"].arrays["negative_document_index"]).all()
    # Document 0 has three of which two are drawn, in any order: six ways.
    assert len({tuple(row) for row in one[:, 0, :PREFIX].tolist()}) > 3


def test_names_shapes_and_types_are_those_of_the_native_batches(world, pools, native_pools):
    batch = world.native(native_pools.values())[0]
    for pool in pools.values():
        assert pool.arrays.keys() == batch.keys()
        for name, array in batch.items():
            assert pool.arrays[name].shape[1:] == array.shape[1:], name
            assert pool.arrays[name].dtype == array.dtype or "weights" in name


def _dataset(world, mixture, lengths, converter, **more):
    return seqio.get_dataset(
        mixture, lengths, converter, dataset_split="train", use_cached=False, seed=0, **more
    )


@pytest.fixture(scope="module")
def model(world):
    config = T5Config(
        vocab_size=world.vocabulary.size,
        embed_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    plain = RetrievalModel(config, world.vocabulary.docids)
    return RankingModel(plain, JointWeights(), prefix_negatives=PREFIX)


def test_the_model_takes_its_batches(world, model):
    dataset = _dataset(
        world,
        world.register("loss"),
        world.lengths,
        ContrastiveFeatureConverter(pack=False),
        shuffle=True,
        num_epochs=None,
        batch_size=6,
    )
    assert all(spec.shape.is_fully_defined() for spec in dataset.element_spec.values())
    batch = next(iter(dataset.as_numpy_iterator()))
    params = jax.jit(lambda key: model.init(key)[0])(jax.random.key(0))
    loss, metrics = jax.jit(model.loss_fn)(params, batch)
    assert np.isfinite(loss) and all(np.isfinite(value) for value in metrics.values())
    assert metrics["retrieval_nce"] > 0


def test_without_documents_it_is_the_plain_converter(world):
    """For stage 1 and for inference; where lengths of documents are given, too."""
    contrastive, plain = world.register("optional"), world.register_plain("optional_not")
    both = [
        _dataset(world, contrastive, PLAIN, ContrastiveFeatureConverter(), shuffle=False),
        _dataset(world, plain, PLAIN, ContrastiveFeatureConverter(), shuffle=False),
        _dataset(world, plain, world.lengths, ContrastiveFeatureConverter(), shuffle=False),
    ]
    expected = _dataset(
        world, plain, PLAIN, seqio.EncDecFeatureConverter(pack=False), shuffle=False
    )
    wanted = list(expected.take(12).as_numpy_iterator())
    for dataset in both:
        assert dataset.element_spec == expected.element_spec
        for one, other in zip(dataset.take(12).as_numpy_iterator(), wanted, strict=True):
            assert all((one[k] == other[k]).all() for k in other)


def test_one_converter_serves_several_data_sets(world):
    converter = ContrastiveFeatureConverter()
    mixture = world.register("several")
    first = _dataset(world, mixture, world.lengths, converter, shuffle=False)
    second = _dataset(world, mixture, PLAIN, converter, shuffle=False)
    assert set(DOCUMENT_FEATURES) == first.element_spec.keys() - second.element_spec.keys()
    assert converter.get_model_feature_lengths(PLAIN).keys() == second.element_spec.keys()
    assert converter.get_model_feature_lengths(world.lengths).keys() == first.element_spec.keys()


def test_places_that_are_padded_hold_no_document(world):
    """SeqIO pads with 0, which is a document."""
    lengths = {**world.lengths, "relevant_index": 5}
    lengths |= {k: 9 for k in lengths if k.startswith("negative")}
    dataset = _dataset(
        world, world.register("padded"), lengths, ContrastiveFeatureConverter(), shuffle=False
    )
    example = next(iter(dataset.as_numpy_iterator()))
    assert example["relevant_index"].tolist()[2:] == [-1] * 3
    assert example["negative_document_index"].tolist()[PREFIX + RETRIEVED :] == [-1] * 4
    width = world.side.views.tokens.shape[1]
    assert example["negative_document_tokens"].shape == (9, width)
    assert example["document_index"].shape == example["document_row"].shape == ()


def test_shards_keep_every_query_with_its_document(world, native_pools):
    world.register("shards")
    seen = []
    for index in range(2):
        dataset = _dataset(
            world,
            "shards_retrieval",
            world.lengths,
            ContrastiveFeatureConverter(),
            shuffle=False,
            shard_info=seqio.ShardInfo(index=index, num_shards=2),
        )
        seen += [
            (tuple(e["encoder_input_tokens"].tolist()), int(e["document_index"]))
            for e in dataset.as_numpy_iterator()
        ]
    arrays = native_pools["retrieval"].arrays
    inputs = map(tuple, arrays["encoder_input_tokens"].tolist())
    assert sorted(seen) == sorted(zip(inputs, arrays["document_index"].tolist(), strict=True))


def test_mistakes():
    with pytest.raises(ValueError, match="cannot be packed"):
        ContrastiveFeatureConverter(pack=True)
    data = tf.data.Dataset.from_tensors({"inputs": [3, 1], "targets": [4, 1]})
    with pytest.raises(ValueError, match="extra features.*document_tokesn"):
        ContrastiveFeatureConverter()(data, {**PLAIN, "document_tokesn": 4})
