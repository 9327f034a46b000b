"""Pseudo-queries: the generator against plain loops, its examples, the file, and what fit does."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAST, tiny_corpus

from genret_jax.cli import main
from genret_jax.configs import GenerationConfig
from genret_jax.corpus import Corpus, Document, write_corpus
from genret_jax.data.batches import materialise
from genret_jax.data.contrastive import known_documents
from genret_jax.data.examples import make_examples
from genret_jax.data.tasks import register
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.docids.build import build_docids
from genret_jax.errors import UserError
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.query_generator import QueryGenerator
from genret_jax.negatives import known_positives
from genret_jax.pseudo_queries import PseudoQuery, read_pseudo_queries, write_pseudo_queries
from genret_jax.pseudo_queries.examples import hold_out, make_pool, nearest, passages_of
from genret_jax.pseudo_queries.generator import Sampler
from genret_jax.pseudo_queries.run import generate
from genret_jax.recipe import load_generator_recipe
from genret_jax.vocabularies import EOS, UNK, Vocabulary, train_text_model

pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = T5Config(
    vocab_size=128,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
)
PIECES = 20
SMALL = (
    "NetworkConfig.embed_dim = 32",
    "NetworkConfig.num_heads = 2",
    "NetworkConfig.head_dim = 16",
    "NetworkConfig.mlp_dim = 32",
    "NetworkConfig.num_encoder_layers = 1",
    "NetworkConfig.num_decoder_layers = 1",
    "VocabularyConfig.size = 200",
    "TrainConfig.batch_size = 16",
    "TrainConfig.steps = 60",
    "TrainConfig.log_every = 10",
    "TrainConfig.warmup_steps = 5",
    "TrainConfig.learning_rate = 1e-2",
    "GenerationConfig.query_length = 16",
    "GenerationConfig.batch_size = 8",
)


@pytest.fixture(scope="module")
def generator():
    """A model, its parameters, and two documents, one of them with an unknown piece."""
    model = QueryGenerator(CONFIG, PIECES)
    params = model.init(jax.random.key(0))[0]
    return model, params, jnp.array([[5, 6, 5, EOS, 0], [9, UNK, 7, 8, EOS]])


def _states(generator, queries):
    model, params, documents = generator
    inputs = jnp.pad(queries, ((0, 0), (1, 0)))[:, :-1]
    batch = {"encoder_input_tokens": documents, "decoder_input_tokens": inputs}
    return jax.jit(model._writer.states)(params, batch)


def _logits(generator, queries):
    """Of every piece at every place of the queries, teacher-forced."""
    model, params, documents = generator
    encoded, decoded = _states(generator, queries)
    return jax.jit(model.piece_logits)(params, decoded, encoded, documents)


def test_copying_is_copynets_joint_softmax(generator):
    model, params, documents = generator
    encoded, decoded = _states(generator, jnp.array([[4, 6, EOS], [7, 8, 9]]))
    found = jax.nn.softmax(jax.jit(model.piece_logits)(params, decoded, encoded, documents))
    decoded, encoded = np.asarray(decoded), np.asarray(encoded)
    plain = np.asarray(model._writer.docid_logits(params, decoded), np.float64)
    for b in range(2):
        for t in range(3):
            mass = np.exp(plain[b, t])
            for i, piece in enumerate(np.asarray(documents)[b]):
                if piece > UNK:
                    mass[piece] += np.exp(float(decoded[b, t] @ encoded[b, i]) / 16**0.5)
            np.testing.assert_allclose(found[b, t], mass / mass.sum(), rtol=2e-5, atol=1e-7)
    assert (np.asarray(found)[..., 0] == 0).all(), "padding is never written"


def test_without_copying_the_document_is_only_attended_to(generator):
    _, params, documents = generator
    model = QueryGenerator(CONFIG, PIECES, copying=False)
    encoded, decoded = _states(generator, jnp.array([[4, EOS], [7, EOS]]))
    found = model.piece_logits(params, decoded, encoded, documents)
    np.testing.assert_array_equal(found, model._writer.docid_logits(params, decoded))


def test_loss_is_the_mean_surprise_of_the_pieces(generator):
    model, params, documents = generator
    targets = jnp.array([[4, 6, EOS], [7, EOS, 0]])
    log_p = jax.nn.log_softmax(_logits(generator, targets))
    surprise = [-log_p[b, t, targets[b, t]] for b, t in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
    batch = {
        "encoder_input_tokens": documents,
        "decoder_input_tokens": jnp.array([[0, 4, 6], [0, 7, 1]]),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(jnp.float32),
    }
    loss, parts = jax.jit(model.loss_fn)(params, batch)
    assert float(loss) == pytest.approx(float(np.mean(surprise)), rel=1e-5)
    assert parts["loss"] == loss and np.isfinite(parts["token_accuracy"])


def _sample(generator, keys, documents=None, **more):
    model, params, given = generator
    options = {"samples": 3, "length": 6, "top_k": 4, "temperature": 1.0, **more}
    sample = jax.jit(functools.partial(model.sample, **options))
    return sample(params, given if documents is None else documents, keys)


def _keys(*rows):
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(5), row))(jnp.array(rows))


def test_samples_score_as_teacher_forcing_does(generator):
    found = _sample(generator, _keys(0, 1), temperature=0.7)
    for s in range(3):
        tokens = found.tokens[:, s]
        log_p = jax.nn.log_softmax(_logits(generator, tokens))
        each = jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
        np.testing.assert_allclose(
            found.log_p[:, s], jnp.where(tokens > 0, each, 0.0).sum(-1), rtol=1e-4
        )
    tokens = np.asarray(found.tokens)
    assert (tokens[..., 0] > UNK).all() and not (tokens == UNK).any()
    ended = (tokens == EOS).any(-1)
    assert (ended == np.asarray(found.ended)).all()
    after = np.cumsum(tokens == EOS, -1) - (tokens == EOS) > 0
    assert not tokens[after].any(), "nothing after EOS"


def test_a_row_depends_on_its_key_and_document_alone(generator):
    _, _, documents = generator
    together = _sample(generator, _keys(7, 8))
    turned = _sample(generator, _keys(8, 7), documents[::-1])
    np.testing.assert_array_equal(together.tokens, turned.tokens[::-1])
    other = _sample(generator, _keys(9, 10))
    assert (np.asarray(together.tokens) != np.asarray(other.tokens)).any()


def test_top_1_is_greedy_and_top_k_stays_among_the_best(generator):
    greedy = np.asarray(_sample(generator, _keys(0, 1), top_k=1, length=4).tokens)
    assert (greedy == greedy[:, :1]).all()
    few = np.asarray(_sample(generator, _keys(0, 1), samples=64, length=1, top_k=3).tokens)[..., 0]
    logits = np.array(_logits(generator, jnp.zeros((2, 1), jnp.int32)))[:, 0]
    logits[:, [0, EOS, UNK]] = -np.inf
    for row, drawn in zip(logits, few, strict=True):
        assert set(drawn.tolist()) == set(np.argsort(-row)[:3].tolist())


def test_temperature_is_that_of_the_softmax(generator):
    drawn = _sample(
        generator, _keys(3, 4), samples=4000, length=1, top_k=PIECES, temperature=0.5
    ).tokens[..., 0]
    logits = np.array(_logits(generator, jnp.zeros((2, 1), jnp.int32)))[:, 0]
    logits[:, [0, EOS, UNK]] = -np.inf
    expected = np.asarray(jax.nn.softmax(logits / 0.5))
    for row, p in zip(np.asarray(drawn), expected, strict=True):
        share = np.bincount(row, minlength=PIECES) / len(row)
        np.testing.assert_allclose(share, p, atol=0.04)


def test_impossible_numbers_are_refused(generator):
    with pytest.raises(ValueError, match="top_k 0"):
        _sample(generator, _keys(0, 1), top_k=0)


@pytest.fixture(scope="module")
def vocabulary():
    corpus = tiny_corpus()
    texts = [d.whole for d in corpus.documents] + list(corpus.queries.values())
    return Vocabulary(train_text_model(texts, size=200), docid_size=2)


def test_pairs_become_t5s_features(vocabulary):
    documents = tiny_corpus().documents
    config = GenerationConfig(query_length=4)
    pairs = [("bread", 1), ("who works with lifts and hoists in tall buildings", 0)]
    arrays = make_pool(documents, pairs, vocabulary, config).arrays
    short, long = (vocabulary.encode(query) for query, _ in pairs)
    targets = arrays["decoder_target_tokens"].tolist()
    assert targets[0][: len(short) + 1] == [*short, EOS]
    assert targets[1] == long[:4], "a query that is cut does not end"
    assert arrays["decoder_input_tokens"][:, 0].tolist() == [0, 0]
    assert arrays["decoder_input_tokens"][1, 1:].tolist() == long[:3]
    assert ((arrays["decoder_loss_weights"] > 0) == (np.array(targets) > 0)).all()
    text = vocabulary.decode(arrays["encoder_input_tokens"][0])
    assert text.startswith("bakers mix dough and bake bread")


def test_a_query_is_learned_from_the_passage_that_answers_it(vocabulary):
    text = f"{'plain words here ' * 12} honey and wax {'more plain words ' * 12}"
    document = Document("d", "bees", text)
    config = GenerationConfig(document_length=16, passages=20)
    found = passages_of(document, vocabulary, config)
    assert len(found) > 5 and all(len(passage) < 16 for passage in found)
    pool = make_pool([document], [("honey wax", 0)], vocabulary, config)
    chosen = vocabulary.decode(pool.arrays["encoder_input_tokens"][0])
    assert "honey" in chosen and "wax" in chosen and chosen.startswith("bees")


@given(
    st.lists(st.lists(st.integers(3, 9), max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(3, 9), max_size=5),
)
def test_nearest_has_the_largest_weight_in_common(passages, query):
    idf = np.arange(10.0)
    weights = [sum(idf[p] for p in set(passage) & set(query)) for passage in passages]
    chosen = nearest([np.array(p, np.int32) for p in passages], np.array(query, np.int32), idf)
    assert chosen == weights.index(max(weights))


@given(st.integers(0, 5), st.integers(20, 60))
@settings(max_examples=20)
def test_whole_documents_are_held_out(seed, documents):
    pairs = [(f"q{d}-{n}", d) for d in range(documents) for n in range(1 + d % 3)]
    pairs += [("asked of many", d) for d in range(documents)]
    held = hold_out(pairs, GenerationConfig(held_out=0.1), seed=seed)
    inside, outside = ({d for _, d in part} for part in (held.train, held.dev))
    assert len(outside) == documents // 10 and not inside & outside
    assert not {q for q, _ in held.train} & {q for q, _ in held.dev}
    few = hold_out(pairs, GenerationConfig(held_out=0.1, dev_pairs=2), seed=seed)
    assert len(few.dev) == 2


def test_few_documents_hold_none_out():
    pairs = [("q", d) for d in range(19)]
    assert hold_out(pairs, GenerationConfig(), seed=0).dev == []


def test_a_sampler_spreads_over_passages_and_does_not_repeat(vocabulary):
    config = GenerationConfig(document_length=12, query_length=3, batch_size=4, top_k=3)
    model = QueryGenerator(
        T5Config(**{**CONFIG.__dict__, "vocab_size": vocabulary.size}), vocabulary.text_size
    )
    params = model.init(jax.random.key(1))[0]
    documents = tiny_corpus().documents[:3]
    sampler = Sampler(model, vocabulary, config, per_document=7, seed=3)
    queries = list(sampler(params, documents))
    counts = sampler.counts
    assert counts.sampled == 21
    assert len(queries) == counts.sampled - counts.unfinished - counts.repeated
    texts = [(q.document, " ".join(q.text.casefold().split())) for q in queries]
    assert len(set(texts)) == len(texts)
    again = Sampler(model, vocabulary, config, per_document=7, seed=3)
    assert list(again(params, documents)) == queries
    assert again.seconds(params, 10) > 0
    wider = GenerationConfig(document_length=12, query_length=3, batch_size=64, top_k=3)
    other = list(Sampler(model, vocabulary, wider, per_document=7, seed=3)(params, documents))
    assert [q.text for q in other] == [q.text for q in queries], "no matter how many at a time"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file of a whole run over the tiny corpus, without train queries for two documents."""
    corpus, place = _partly_asked(), tmp_path_factory.mktemp("pseudo")
    write_corpus(corpus, place / "tiny")
    out = place / "pseudo.jsonl"
    options = [part for binding in SMALL for part in ("--gin", binding)]
    command = ["pseudo-queries", str(place / "tiny"), "--out", str(out), "--per-document", "6"]
    assert main([*command, "--json", *options]) == 0
    return place / "tiny", out


def _partly_asked() -> Corpus:
    corpus = tiny_corpus()
    train = {q: j for q, j in corpus.qrels["train"].items() if not {"maps", "trees"} & set(j)}
    return Corpus(corpus.documents, corpus.queries, {**corpus.qrels, "train": train}, name="part")


def test_every_document_is_asked_for(made):
    _, out = made
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["document"] for r in records} == {d.id for d in tiny_corpus().documents}
    assert len({r["_id"] for r in records}) == len(records)
    assert all(r["log_p"] < 0 and r["text"] for r in records)
    lines = (out.with_name("pseudo.jsonl.generator") / "metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]


def test_a_generator_is_sampled_anew_without_training_again(made, tmp_path):
    folder, out = made
    recipe = load_generator_recipe(bindings=[*SMALL, "GenerationConfig.top_k = 2"])
    report = generate(folder, recipe=recipe, out=out, per_document=4, round_trip=1)
    assert report["steps"] == 60 and report["sampled"] == 32
    lost = report["unfinished"] + report["repeated"] + report["not_found_again"]
    assert report["kept"] == report["sampled"] - lost == len(out.read_text().splitlines())
    with pytest.raises(UserError, match="another recipe or corpus"):
        generate(folder, recipe=load_generator_recipe(), out=out)


def test_the_round_trip_keeps_what_bm25_brings_back():
    from genret_jax.pseudo_queries.run import _RoundTrip

    trip = _RoundTrip(tiny_corpus().documents, 1)
    given = [
        PseudoQuery("bread", "bake rolls", -1.0),
        PseudoQuery("bread", "repair hoists", -1.0),
        PseudoQuery("lifts", "repair hoists", -1.0),
        PseudoQuery("lifts", "zzz", -1.0),
    ]
    assert list(trip(given)) == [given[0], given[2]]
    assert trip.dropped == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_document": 0}, "per_document must be 1 or more, found 0"),
        ({"round_trip": -1}, "round_trip must be 0"),
        ({"minutes": 0}, "minutes must be a number above 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        generate(
            tiny_corpus(), recipe=load_generator_recipe(), out=tmp_path / "p.jsonl", **arguments
        )


def test_without_train_queries_there_is_nothing_to_learn_from(tmp_path):
    corpus = Corpus(tiny_corpus().documents, {}, {})
    with pytest.raises(UserError, match="no train queries to learn from"):
        generate(corpus, recipe=load_generator_recipe(), out=tmp_path / "p.jsonl")


def test_a_budget_must_hold_the_sampling(tmp_path):
    with pytest.raises(UserError, match="raise --minutes or lower --per-document"):
        generate(
            tiny_corpus(),
            recipe=load_generator_recipe(bindings=SMALL),
            out=tmp_path / "p.jsonl",
            minutes=1e-3,
        )


def test_the_file_gives_its_pairs_back(tmp_path):
    corpus, path = tiny_corpus(), tmp_path / "p.jsonl.gz"
    queries = [PseudoQuery("bees", "wax?", -1.23456), PseudoQuery("lifts", "héists", -2.0)]
    assert write_pseudo_queries(iter(queries), path) == 2
    index = corpus.index
    assert read_pseudo_queries(path, corpus) == [
        ("wax?", index["bees"]),
        ("héists", index["lifts"]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "a", "text": "x"}', "p.jsonl:2: no field 'document'"),
        ('{"_id": "a", "text": "x", "document": "no"}', "document 'no' is not in corpus 'tiny'"),
        ('{"_id": "0", "text": "x", "document": "bees"}', "is also at line 1"),
        ('{"_id": "a", "text": " ", "document": "bees"}', "p.jsonl:2: the query has no words"),
    ],
)
def test_broken_files_are_named_by_their_line(line, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"_id": "0", "text": "y", "document": "bees"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        read_pseudo_queries(path, tiny_corpus())


def test_an_empty_file_is_a_mistake(tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(UserError, match="no pseudo-queries in it"):
        read_pseudo_queries(tmp_path / "p.jsonl", tiny_corpus())


@pytest.fixture(scope="module")
def mixed(vocabulary):
    """Examples with pseudo-queries of two documents."""
    corpus = tiny_corpus()
    table = build_docids("atomic", corpus.documents)
    whole = Vocabulary(vocabulary.model, table.vocab_size)
    pairs, pseudo = corpus.pairs("train"), [("bake rolls", 1), ("wax hives", 4), ("honey", 4)]
    examples = make_examples(corpus.documents, [*pairs, *pseudo], whole, table, pseudo=len(pseudo))
    return examples, whole, pairs, pseudo


def _rates(examples, vocabulary, **more):
    register("mixed", examples, SeqioVocabulary(vocabulary), indexing_share=0.2, **more)
    lengths = {"inputs": 12, "targets": 2}
    pools = materialise("mixed", lengths=lengths, passes={}, seed=0)
    return {pool.name: pool for pool in pools}


def test_pseudo_queries_are_a_task_of_their_own(mixed):
    examples, vocabulary, pairs, pseudo = mixed
    assert (examples.real, examples.pseudo) == (len(pairs), 3)
    pools = _rates(examples, vocabulary, pseudo_share=0.25)
    rates = {name: pool.rate for name, pool in pools.items()}
    assert rates == pytest.approx(
        {"mixed_indexing": 0.2, "mixed_pseudo": 0.2, "mixed_retrieval": 0.6}
    )
    sizes = {name: len(pool) for name, pool in pools.items()}
    assert sizes == {"mixed_indexing": 8, "mixed_pseudo": 3, "mixed_retrieval": len(pairs)}
    inputs = pools["mixed_pseudo"].arrays["encoder_input_tokens"]
    assert [vocabulary.decode(row) for row in inputs] == [text for text, _ in pseudo]
    positives = known_positives([*pairs, *pseudo])
    document, question = known_documents("mixed_pseudo", examples, positives)
    assert document.tolist() == [1, 4, 4]
    assert [positives.queries[i] for i in question] == [text for text, _ in pseudo]
    document, question = known_documents("mixed_retrieval", examples, positives)
    assert document.tolist() == [d for _, d in pairs]


def test_frames_are_those_of_real_queries(mixed):
    examples, vocabulary, pairs, _ = mixed
    alone = make_examples(
        tiny_corpus().documents, pairs, vocabulary, build_docids("atomic", tiny_corpus().documents)
    )
    np.testing.assert_array_equal(examples.frames.values, alone.frames.values)
    np.testing.assert_array_equal(examples.frames.offsets, alone.frames.offsets)


def test_without_train_queries_pseudo_queries_are_all(mixed):
    examples, vocabulary, _, pseudo = mixed
    corpus = tiny_corpus()
    table = build_docids("atomic", corpus.documents)
    only = make_examples(corpus.documents, pseudo, vocabulary, table, pseudo=3)
    rates = {name: pool.rate for name, pool in _rates(only, vocabulary, pseudo_share=0.25).items()}
    assert rates == pytest.approx({"mixed_indexing": 0.2, "mixed_pseudo": 0.8})


def test_fit_learns_from_pseudo_queries(tmp_path, capsys):
    write_corpus(_partly_asked(), tmp_path / "tiny")
    queries = [PseudoQuery("maps", "survey drawings", -1.0)] * 3
    write_pseudo_queries(queries, tmp_path / "p.jsonl")
    steps = ("TrainConfig.steps = 4", "ContrastiveConfig.steps = 4", "TrainConfig.evaluations = 1")
    options = [part for binding in (*FAST, *steps) for part in ("--gin", binding)]
    command = ["fit", str(tmp_path / "tiny"), "--out", str(tmp_path / "run"), *options, "--json"]
    assert main([*command, "--pseudo-queries", str(tmp_path / "p.jsonl")]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["training"]["pseudo_queries"] == 3
    assert about["training"]["pairs"] == 30
    assert main(command) == 2, "the run without them is another run"
    assert "another recipe or corpus" in capsys.readouterr().err
