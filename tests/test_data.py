"""SeqIO tasks and batches against plain Python over the same examples."""

from __future__ import annotations

import numpy as np
import pytest
import seqio
import tensorflow as tf
from tiny import tiny_corpus

from genret_jax.corpus import Document
from genret_jax.data.batches import Batches, Pool, length_buckets, materialise
from genret_jax.data.examples import Ragged, make_examples, query_frames
from genret_jax.data.tasks import drop_words, register
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.docids.build import build_docids
from genret_jax.docids.table import DocidTable
from genret_jax.errors import UserError
from genret_jax.vocabularies import Vocabulary, train_text_model

LENGTHS = {"inputs": 12, "targets": 4}


@pytest.fixture(scope="module")
def corpus():
    return tiny_corpus()


@pytest.fixture(scope="module")
def table(corpus):
    return build_docids("naive", corpus.documents)


@pytest.fixture(scope="module")
def vocabulary(corpus, table):
    texts = [f"{d.title} {d.text}" for d in corpus.documents] + list(corpus.queries.values())
    return Vocabulary(train_text_model(texts, size=150), table.vocab_size)


@pytest.fixture(scope="module")
def examples(corpus, table, vocabulary):
    return make_examples(corpus.documents, corpus.pairs("train"), vocabulary, table)


def _pairs_of(pool, vocabulary, table):
    """(text, document position) of every example of a pool, decoded again."""
    rows = {tuple(r): d for r, d in zip(table.tokens.tolist(), table.documents, strict=True)}
    targets = np.asarray(vocabulary.docids.to_local(pool.arrays["decoder_target_tokens"]))
    width = table.tokens.shape[1]
    assert not targets[:, width:].any()
    found = [rows[tuple(t[:width])] for t in targets.tolist()]
    return [
        (vocabulary.decode(x), d)
        for x, d in zip(pool.arrays["encoder_input_tokens"], found, strict=True)
    ]


def test_ragged_is_its_sequences():
    sequences = [[3, 4], [], [5], [6, 7, 8]]
    ragged = Ragged.of(sequences)
    assert [ragged[i].tolist() for i in range(len(ragged))] == sequences
    assert ragged.lengths.tolist() == [2, 0, 1, 3]


def test_retrieval_task_holds_every_train_pair(corpus, examples, vocabulary, table):
    register("t1", examples, SeqioVocabulary(vocabulary), indexing_share=0.0)
    (pool,) = materialise("t1", lengths={"inputs": 32, "targets": 4}, passes={}, seed=0)
    wanted = [(" ".join(q.lower().split()), d) for q, d in corpus.pairs("train")]
    assert _pairs_of(pool, vocabulary, table) == wanted


def test_model_features_are_t5xs(examples, vocabulary):
    register("t2", examples, SeqioVocabulary(vocabulary))
    for pool in materialise("t2", lengths=LENGTHS, passes={}, seed=0):
        arrays = pool.arrays
        targets, weights = arrays["decoder_target_tokens"], arrays["decoder_loss_weights"]
        assert (arrays["decoder_input_tokens"][:, 0] == 0).all()
        shifted = arrays["decoder_input_tokens"][:, 1:]
        assert (shifted[weights[:, 1:] > 0] == targets[:, :-1][weights[:, 1:] > 0]).all()
        assert ((weights > 0) == (targets > 0)).all()
        inputs = arrays["encoder_input_tokens"]
        ends = inputs[np.arange(len(inputs)), (inputs > 0).sum(1) - 1]
        assert (ends == 1).all(), "an input ends with EOS even where it was cut"


def test_indexing_pieces_are_of_their_document(corpus, examples, vocabulary, table):
    register("t3", examples, SeqioVocabulary(vocabulary), indexing_share=1.0)
    (pool,) = materialise("t3", lengths=LENGTHS, passes={"indexing": 20}, seed=0)
    assert len(pool) == 20 * len(corpus.documents)
    kinds = set()
    for text, d in _pairs_of(pool, vocabulary, table):
        title, body = corpus.documents[d].title.lower(), corpus.documents[d].text.lower()
        assert text and text in f"{title} {body}"
        kinds.add("title" if text == title else "beginning" if title in text else "span")
    assert kinds == {"title", "beginning", "span"}


def test_a_title_of_several_documents_is_drawn_the_less(vocabulary, table):
    documents = [
        Document(f"d{i}", "bread" if i < 4 else f"{'bees' * i}", "slim guy 1973") for i in range(8)
    ]
    examples = make_examples(documents, [], vocabulary, table)
    assert examples.title_counts.tolist() == [4] * 4 + [1] * 4
    register("t6", examples, SeqioVocabulary(vocabulary), indexing_share=1.0, title_share=0.6)
    lengths = {"inputs": 64, "targets": 4}
    (pool,) = materialise("t6", lengths=lengths, passes={"indexing": 400}, seed=0)
    inputs = pool.arrays["encoder_input_tokens"].reshape(400, 8, -1).tolist()
    shares = [
        np.mean([[t for t in turn[i] if t] == [*examples.titles[i], 1] for turn in inputs])
        for i in range(8)
    ]
    assert shares[:4] == pytest.approx([0.6 / 4] * 4, abs=0.07)
    assert shares[4:] == pytest.approx([0.6] * 4, abs=0.09)


STARTS = np.array([True] * 20 + [False] * 10)  # pieces 20 to 29 go on with a word


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        # What two queries hold is how they ask; words of several pieces count as wholes.
        ([[3, 4, 5], [3, 4, 6]], [[3, 4, 0], [3, 4, 0]]),
        ([[3, 21, 5], [3, 22, 5], [3, 21, 6]], [[3, 21, 5], [0, 0, 5], [3, 21, 0]]),
        ([[5, 5], [6]], [[0, 0], [0]]),  # twice in one query is one query
        ([[25, 3], [25, 4]], [[25, 0], [25, 0]]),  # a text may begin inside a word
        ([[], [3, 4], [3, 5]], [[], [3, 0], [3, 0]]),
        ([[3, 4], [3, 4], [5]], [[0, 0], [0]]),  # relevant to two documents, but asked once
        ([], []),
    ],
)
def test_frames_by_hand(queries, expected):
    frames = query_frames(Ragged.of(queries), STARTS)
    assert [frames[i].tolist() for i in range(len(frames))] == expected


def test_among_many_queries_a_shared_word_is_one_of_half_a_percent():
    kinds = (4 if i < 4 else 5 if i < 9 else 6 + i % 2 for i in range(1000))
    queries = [[3, kind, 100 + i] for i, kind in enumerate(kinds)]
    frames = query_frames(Ragged.of(queries), np.ones(1100, bool))
    assert frames[0].tolist() == [3, 0, 0]  # 4 of 1000
    assert frames[5].tolist() == [3, 5, 0]  # 5 of 1000


def test_framed_pieces_ask_about_their_document(corpus, examples, vocabulary, table):
    lengths = {"inputs": 64, "targets": 4}
    options = {"indexing_share": 1.0, "title_share": 0.0, "frame_share": 1.0}
    register("t7", examples, SeqioVocabulary(vocabulary), **options)
    (pool,) = materialise("t7", lengths=lengths, passes={"indexing": 30}, seed=0)
    frames = [examples.frames[i].tolist() for i in range(len(examples.frames))]
    bodies = [examples.bodies[i].tolist() for i in range(8)]
    in_frames = 0
    for turn, row in enumerate(pool.arrays["encoder_input_tokens"].tolist()):
        piece, body = [t for t in row if t > 1], bodies[turn % 8]
        if _holds(body, piece):
            continue  # a span as it stands: of a frame that is all places, or has none
        assert any(_fits(piece, frame, body) for frame in frames)
        in_frames += 1
    assert in_frames > 50
    assert any(0 not in frame for frame in frames), "one without places is never an example"


def _holds(body, run):
    return any(body[i : i + len(run)] == run for i in range(len(body)))


def _fits(piece, frame, body):
    """Whether the frame with a run of the body in its places is the piece."""
    if len(frame) != len(piece) or 0 not in frame:
        return False
    run = [t for t, f in zip(piece, frame, strict=True) if f == 0]
    rest = all(t == f for t, f in zip(piece, frame, strict=True) if f)
    return rest and _holds(body, run)


def test_a_frame_with_more_places_than_the_document_has_words(vocabulary, table):
    """What is left over of the places is left out."""
    documents = [Document(f"d{i}", "", "bread") for i in range(8)]
    pairs = [("who works with bees and honey and wax", 0), ("who works with lifts", 1)]
    examples = make_examples(documents, pairs, vocabulary, table)
    assert 0 in examples.frames[0] and (examples.frames[0] > 0).any()
    options = {"indexing_share": 1.0, "title_share": 0.0, "frame_share": 1.0}
    register("t8", examples, SeqioVocabulary(vocabulary), **options)
    lengths = {"inputs": 64, "targets": 4}
    (pool,) = materialise("t8", lengths=lengths, passes={"indexing": 20}, seed=0)
    body = examples.bodies[0].tolist()
    asked = [t for t in examples.frames[0].tolist() if t]
    pieces = [[t for t in row if t > 1] for row in pool.arrays["encoder_input_tokens"].tolist()]
    assert all(set(body) & set(piece) for piece in pieces)
    wanted = sorted(asked + body)
    assert any(sorted(piece) == wanted for piece in pieces)


def test_materialised_examples_follow_the_seed(examples, vocabulary):
    register("t4", examples, SeqioVocabulary(vocabulary), indexing_share=1.0)
    a, b, c = (
        materialise("t4", lengths=LENGTHS, passes={"indexing": 3}, seed=s)[0].arrays
        for s in (1, 1, 2)
    )
    assert all((a[k] == b[k]).all() for k in a)
    assert any((a[k] != c[k]).any() for k in a)


def test_mixture_rates_and_t5x_reading(examples, vocabulary):
    register("t5", examples, SeqioVocabulary(vocabulary), indexing_share=0.25)
    pools = materialise("t5", lengths=LENGTHS, passes={}, seed=0)
    rates = [p.rate for p in pools]
    assert sorted(rates) == pytest.approx([0.25, 0.75])
    dataset = seqio.get_dataset(  # as T5X does: shuffled, endless
        "t5",
        LENGTHS,
        seqio.EncDecFeatureConverter(pack=False),
        shuffle=True,
        num_epochs=None,
        seed=0,
        batch_size=4,
    )
    batch = next(iter(dataset.as_numpy_iterator()))
    assert batch["encoder_input_tokens"].shape == (4, 12)


def test_dropped_words_are_never_all():
    data = tf.data.Dataset.from_tensor_slices(
        {"inputs": [[5, 6, 7, 8]] * 200, "targets": [[1]] * 200}
    )
    lengths = [len(e["inputs"]) for e in drop_words(data, rate=0.5).as_numpy_iterator()]
    assert min(lengths) >= 1 and 1.5 < np.mean(lengths) < 2.6


def test_a_document_without_docid_is_an_error(corpus, vocabulary):
    table = DocidTable.from_sequences([[2], [3]], [0, 1], ["<pad>", "</s>", "a", "b"], "x", {})
    with pytest.raises(UserError, match="6 of 8 documents have no docid"):
        make_examples(corpus.documents, [], vocabulary, table)


def _pool(lengths, rate, start):
    tokens = np.zeros((len(lengths), 16), np.int32)
    for row, n in zip(tokens, lengths, strict=True):
        row[:n] = 5
    marks = np.arange(start, start + len(lengths), dtype=np.int32)[:, None]
    return Pool({"encoder_input_tokens": tokens, "mark": marks}, rate)


@pytest.fixture(scope="module")
def pools():
    rng = np.random.default_rng(0)
    return [_pool(rng.integers(1, 17, 100), 0.75, 0), _pool(rng.integers(1, 17, 30), 0.25, 1000)]


def test_a_round_holds_every_example_of_the_first_task(pools):
    batches = Batches(pools, batch_size=8, seed=3, buckets=(4, 8, 16))
    for turn in range(3):
        first = turn * batches.round_size
        marks = np.concatenate(
            [batches[first + i]["mark"][:, 0] for i in range(batches.round_size)]
        )
        main = marks[marks < 1000]
        assert set(main) == set(range(100))
        assert 100 <= len(main) < 108 and 33 <= (marks >= 1000).sum() < 41


def test_batches_fit_their_bucket_and_repeat_exactly(pools):
    batches = Batches(pools, batch_size=8, seed=3, buckets=(4, 8, 16))
    again = Batches(pools, batch_size=8, seed=3, buckets=(4, 8, 16))
    other = Batches(pools, batch_size=8, seed=4, buckets=(4, 8, 16))
    shapes = {b["encoder_input_tokens"].shape for b in batches.shapes()}
    used = set()
    for n in (40, 3, 17, 0, 25):  # any order: a batch depends on its number alone
        batch, same = batches[n], again[n]
        assert all((batch[k] == same[k]).all() for k in batch)
        used.add(batch["encoder_input_tokens"].shape)
        assert batch["encoder_input_tokens"].shape in shapes
        full = np.stack([_length(pools, mark) for mark in batch["mark"][:, 0]])
        assert ((batch["encoder_input_tokens"] > 0).sum(1) == full).all()
    assert len(used) > 1
    assert any((batches[n]["mark"] != other[n]["mark"]).any() for n in range(3))


def _length(pools, mark):
    pool, row = (pools[0], mark) if mark < 1000 else (pools[1], mark - 1000)
    return (pool.arrays["encoder_input_tokens"][row] > 0).sum()


def test_processes_cut_the_same_global_batch(pools):
    whole = Batches(pools, batch_size=8, seed=3, buckets=(4, 8, 16))
    parts = [
        Batches(pools, batch_size=8, seed=3, buckets=(4, 8, 16), shard=(i, 2)) for i in range(2)
    ]
    for n in range(5):
        together = np.concatenate([p[n]["mark"] for p in parts])
        assert (together == whole[n]["mark"]).all()
    with pytest.raises(ValueError, match="does not divide"):
        Batches(pools, batch_size=9, seed=0, buckets=(16,), shard=(0, 2))


def test_a_collection_smaller_than_a_batch_still_fills_one():
    batches = Batches([_pool([3, 9], 1.0, 0)], batch_size=8, seed=0, buckets=(4, 16))
    assert batches.round_size == 1
    assert set(batches[0]["mark"][:, 0]) == {0, 1} and len(batches[0]["mark"]) == 8


def test_few_queries_a_document_ask_for_more_indexing(examples):
    assert examples.indexing_share(0.2) == 0.2
    assert examples.indexing_share(-1.0) == pytest.approx(8 / (8 + 5))  # 40 pairs, 8 documents


def test_length_buckets():
    assert length_buckets(np.array([3] * 65 + [7] * 30 + [15] * 5), 16) == (4, 8, 16)
    assert length_buckets(np.array([15] * 10), 16) == (16,)
    assert length_buckets(np.array([], int), 32) == (32,)


def test_seqio_vocabulary(vocabulary):
    seqio_vocabulary = SeqioVocabulary(vocabulary)
    ids = seqio_vocabulary.encode("repair lifts")
    assert seqio_vocabulary.encode_tf(tf.constant("repair lifts")).numpy().tolist() == list(ids)
    assert seqio_vocabulary.decode(ids) == "repair lifts"
    docid = int(vocabulary.docids.to_model(np.int32(4)))
    assert seqio_vocabulary.decode([*ids, docid]) == "repair lifts <docid:4>"
    assert seqio_vocabulary.vocab_size == vocabulary.size
    assert seqio_vocabulary == SeqioVocabulary(vocabulary)
    wide = Vocabulary(vocabulary.model, vocabulary.docid_size, 512)
    docid = int(wide.docids.to_model(np.int32(4)))
    assert docid == 514 and SeqioVocabulary(wide).decode([*ids, docid]) == "repair lifts <docid:4>"
