"""Learning to rank upon n-grams: sums by hand, the table and its batches, and a whole run."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from tiny import FAST, tiny_corpus

import genret_jax.stages.ngram_margin as stage
from genret_jax.cli import main
from genret_jax.errors import UserError
from genret_jax.modeling.ngram_margin import NgramMarginModel, ngram_sums
from genret_jax.negatives import known_positives
from genret_jax.ngram.batches import RankedBatches, longest
from genret_jax.ngram.ranked import RankedQueries, Ranking
from genret_jax.ngram.settings import NgramSettings
from genret_jax.recipe import gin_folder, load_recipe
from genret_jax.searchers import fit_method, open_searcher
from genret_jax.splitting import split_corpus
from genret_jax.stages.ngram import NgramTraining
from genret_jax.training import partitioning
from genret_jax.training.budget import Clock, with_steps
from genret_jax.training.journal import read_records

pytestmark = pytest.mark.usefixtures("one_device", "quiet")

VIEWS = ("text", "title", "queries")
SETTINGS = {"views": VIEWS, "length": 4, "beam": 5, "unigrams": 4, "spans": 3, "smoothing": 0.5}
SETTINGS |= {"ranked": 4}
QUERIES = ("bread from an oven", "somebody for lifts", "who works with bees", "teeth and gums")


def _recipe(*more, method="ltrgr-minder"):
    lines = [*FAST, f"SearcherConfig.settings = {SETTINGS!r}", *more]
    return load_recipe(method, bindings=lines)


# ---- the sum


def test_a_sum_by_hand_and_its_gradient():
    log_p = jnp.log(jnp.array([0.25, 0.1, 0.5]))
    priors = jnp.log(jnp.array([1 / 9, 1 / 3, 1.0]))
    factors = jnp.array([1.0, 0.5, 0.0])

    def score(log_p):
        return ngram_sums(log_p, priors, factors, alpha=2.0)

    # Odds 1/3 against 1/9: log 3; 1/9 against 1/3 is no excess; the third is no term.
    assert float(score(log_p)) == pytest.approx(math.log(3) ** 2, rel=1e-5)
    # d logit p / d log p = 1 / (1 - p)
    expected = 2 * math.log(3) / 0.75
    np.testing.assert_allclose(jax.grad(score)(log_p), [expected, 0, 0], rtol=1e-5)
    for alpha in (0.5, 1.0, 2.0):  # at no excess and at a certainty, too
        at = jnp.array([0.0, math.log(0.25), -1e-9])
        gradient = jax.grad(lambda x, a=alpha: ngram_sums(x, priors, jnp.ones(3), alpha=a))(at)
        assert np.isfinite(gradient).all()


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(1, 3), min_size=1, max_size=3)),
        max_size=9,
    )
)
def test_the_longest_are_those_that_no_other_begins_with(drawn):
    ngrams = {(view, tuple(tokens)) for view, tokens in drawn}
    expected = [
        (view, tokens)
        for view, tokens in sorted(ngrams)
        if not any(
            other != (view, tokens) and other[0] == view and other[1][: len(tokens)] == tokens
            for other in ngrams
        )
    ]
    assert longest(ngrams) == expected


# ---- a whole run


@pytest.fixture(scope="module")
def run(collection, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ltrgr"
    fit_method(collection, recipe=_recipe(), out=out)
    return out


@pytest.fixture(scope="module")
def fitted(run):
    return open_searcher(run)


@pytest.fixture(scope="module")
def ranked(fitted):
    """For a few queries what the model ranks, why, and what answers them."""
    searcher = fitted.searcher
    explained = list(searcher.ranker.explain(searcher.params, QUERIES))
    index = tiny_corpus().index
    relevant = [frozenset([index[name]]) for name in ("bread", "lifts", "bees", "teeth")]
    return [Ranking.of(one, ranks=100) for one in explained], explained, relevant


def _chosen(fitted, ranked, relevant=None, **more):
    """Of every query the documents to tell apart."""
    rankings, explained, answers = ranked
    views = fitted.searcher.ranker.views
    settings = {"smoothing": 0.5, "wrong": 7, "terms": 40, "rng": np.random.default_rng(0), **more}
    return [
        ranking.choose(known, why, views, **settings)
        for ranking, why, known in zip(rankings, explained, relevant or answers, strict=True)
    ]


def _table(fitted, chosen, **more):
    ranker = fitted.searcher.ranker
    tokens = np.stack([ranker.encoded(QUERIES, view) for view in ranker.views], axis=1)
    return RankedQueries.of(chosen, tokens, length=4, **more)


class _FirstStage:
    """Batches of queries alone, with an n-gram each."""

    def __init__(self, tokens):
        self._tokens = tokens

    def __getitem__(self, n):
        target = np.array([[3, 4]] * len(self._tokens), np.int32)
        return {
            "encoder_input_tokens": self._tokens,
            "decoder_target_tokens": target,
            "decoder_input_tokens": np.array([[0, 3]] * len(target), np.int32),
            "decoder_loss_weights": np.ones(target.shape, np.float32),
        }

    def shapes(self):
        return [self[0]]


def test_rankings_are_those_of_the_search(fitted, ranked):
    for query, one in zip(QUERIES, ranked[0], strict=True):
        hits = fitted.search(query, k=8)
        positions = [tiny_corpus().index[hit.document] for hit in hits]
        assert sorted(one.documents) == sorted(positions)
        assert one.scores == pytest.approx([hit.score for hit in hits], rel=1e-6)
        for terms in one.terms:
            assert len({key for _, key, _ in terms}) == len(terms), "each counts once"
            added = [value for value, _, _ in terms]
            assert added == sorted(added, reverse=True)


def test_scores_of_a_batch_are_those_of_the_search(fitted, ranked):
    """By teacher forcing, of all rows and documents, whatever is drawn."""
    searcher, table = fitted.searcher, _table(fitted, _chosen(fitted, ranked))
    batches = RankedBatches(_FirstStage(table.tokens[:, 0]), table, rows=4, seed=0)
    model = NgramMarginModel(searcher.ranker.model, rank=0.01)
    scores, loss = jax.jit(model.scores), jax.jit(model.loss_fn)
    seen = set()
    for n in range(5):
        batch = batches[n]
        found = np.asarray(scores(searcher.params, batch))
        queries = batches._queries(n)
        for row, query in enumerate(queries.tolist()):
            one, known = ranked[0][query], ranked[2][query]
            by_document = dict(zip(one.documents, one.scores, strict=True))
            right = [by_document[d] for d in one.documents if d in known]
            wrong = [by_document[d] for d in one.documents if d not in known]
            assert found[row, :3] == pytest.approx([right[0], wrong[0], right[0]], rel=1e-4)
            drawn = [i for i, s in enumerate(wrong) if s == pytest.approx(found[row, 3], rel=1e-4)]
            assert drawn
            seen.add((query, drawn[0]))
        # The loss by hand, of the scores that were checked; and what generation costs.
        value, parts = loss(searcher.params, batch)
        top = np.maximum(found[:, 1] - found[:, 0] + 300, 0).mean()
        other = np.maximum(found[:, 3] - found[:, 2] + 400, 0).mean()
        assert float(parts["rank"]) == pytest.approx(0.5 * top + 0.5 * other, rel=1e-4)
        generation = jax.jit(searcher.ranker.model.loss_fn)(searcher.params, batch)[0]
        expected = float(generation) + 0.01 * float(parts["rank"])
        assert float(value) == pytest.approx(expected, rel=1e-5)
        assert set(queries.tolist()) == {0, 1, 2, 3}, "each once before any comes again"
    assert len(seen) > 4, "the second wrong document is a random one"


def test_scores_of_any_ngrams_are_those_of_a_plain_loop(fitted):
    """N-grams of several tokens, some of them the beginnings of others, in several views."""
    ranker, params = fitted.searcher.ranker, fitted.searcher.params
    rng = np.random.default_rng(5)
    tokens = np.stack([ranker.encoded(QUERIES, view) for view in ranker.views], axis=1)
    ngrams = rng.integers(3, 60, (4, 12, 4))
    ngrams[:, 6:] = ngrams[:, :6]  # the same with other ends
    for i, length in enumerate([4, 3, 2, 1, 4, 2, 1, 2, 4, 1, 3, 1]):
        ngrams[:, i, length:] = 0
    views = np.tile(np.arange(12) % 3, (4, 1))
    views[:, 6:] = views[:, :6]
    right, wrong = rng.integers(-1, 12, (4, 4, 5)), rng.integers(-1, 12, (4, 3, 5))
    right[:, :, 0], wrong[:, :, 0] = rng.integers(0, 12, (4, 4)), rng.integers(0, 12, (4, 3))
    factors = [np.where(n >= 0, rng.uniform(0.2, 1, n.shape), 0) for n in (right, wrong)]
    priors = rng.uniform(-9, -4, (4, 12))
    arrays = [tokens, ngrams, views, priors, right, wrong, *factors]
    table = RankedQueries(
        *(a.astype(np.float32 if a.dtype.kind == "f" else np.int32) for a in arrays), "", 4
    )
    batches = RankedBatches(_FirstStage(tokens[:, 0]), table, rows=4, seed=3)
    found = np.asarray(jax.jit(NgramMarginModel(ranker.model).scores)(params, batches[2]))
    log_p = np.array(
        [
            jax.jit(ranker.model.score)(params, tokens[row, views[row]], ngrams[row])
            for row in range(4)
        ]
    )
    odds = log_p - np.log(-np.expm1(log_p))
    weights = np.maximum(odds - priors, 0) ** 2
    queries = batches._queries(2)
    assert sorted(queries.tolist()) == [0, 1, 2, 3]
    for row, q in enumerate(queries.tolist()):

        def sums(numbers, factors, q=q):
            return [
                sum(f * weights[q, n] for n, f in zip(*terms, strict=True) if n >= 0)
                for terms in zip(numbers[q].tolist(), factors[q].tolist(), strict=True)
            ]

        good, bad = sums(right, factors[0]), sums(wrong, factors[1])
        assert found[row, :2] == pytest.approx([good[0], bad[0]], rel=1e-4)
        assert any(found[row, 2] == pytest.approx(score, rel=1e-4) for score in good)
        assert any(found[row, 3] == pytest.approx(score, rel=1e-4) for score in bad)


def test_the_first_and_a_draw_of_the_others_are_kept(fitted, ranked, tmp_path):
    rankings, explained, relevant = ranked
    everyone = [frozenset(range(8)) - known for known in relevant]  # all others answer
    chosen = _chosen(fitted, ranked, everyone, terms=3, wrong=2)
    for one, why, known, kept in zip(rankings, explained, everyone, chosen, strict=True):
        places = [place for place, document in enumerate(one.documents) if document in known]
        sums = []
        for place in places:
            ngrams = []
            for _, (view, n), factor in one.terms[place][:3]:
                found, index = why[view][0], fitted.searcher.ranker.views[view]
                tokens = index.trie.rows[found.begin[n], : found.length[n]]
                ngrams.append((VIEWS.index(view), tuple(tokens[tokens > 0].tolist()), factor))
            sums.append(ngrams)
        named = [[(kept.views[n], kept.ngrams[n], f) for n, f in terms] for terms in kept.right]
        assert named[0] == sums[0] and all(terms in sums for terms in named)
        assert len(named) == min(4, len(places)) and len(kept.wrong) == len(one.documents) - len(
            places
        )
    table = _table(fitted, chosen, digest="of these", asked=9)
    assert table.right.shape[2] == table.wrong.shape[2] <= 3
    for row, kept in enumerate(chosen):
        for name in ("right", "wrong"):
            numbers, factors = getattr(table, name)[row], getattr(table, f"{name}_factors")[row]
            for column, terms in enumerate(getattr(kept, name)):
                assert numbers[column, : len(terms)].tolist() == [n for n, _ in terms]
                assert factors[column, : len(terms)] == pytest.approx([f for _, f in terms])
                assert (numbers[column, len(terms) :] == -1).all()
            assert (numbers[len(getattr(kept, name)) :] == -1).all()
    table.save(tmp_path / "ranked")
    loaded = RankedQueries.load(tmp_path / "ranked")
    for field in dataclasses.fields(table):
        one, other = getattr(table, field.name), getattr(loaded, field.name)
        np.testing.assert_array_equal(one, other)
    assert table.report() == {"queries": 9, "violating": 4, "wrong_documents": 1.0}
    (tmp_path / "ranked" / "ranked.npz").unlink()
    with pytest.raises(UserError, match="no whole table of ranked queries"):
        RankedQueries.load(tmp_path / "ranked")


def test_only_what_violates_a_margin_is_learned_from():
    one = Ranking([4, 2, 7, 1], [9.0, 5.0, 4.0, 1.0], [])

    def violates(relevant, margin, drawn_margin):
        return one.may_violate(frozenset(relevant), margin=margin, drawn_margin=drawn_margin)

    assert not violates([4], 3.0, 3.5) and violates([4], 4.5, 4.5)
    assert violates([2], 0.0, 0.0) and violates([4, 1], 0.0, 0.0)
    assert violates([4], 3.0, 4.5) and not violates([4, 2], 4.0, 0.5)
    assert not violates([8], 9.0, 9.0) and not violates([4, 2, 7, 1], 9.0, 9.0)


def test_the_margin_is_learned(fitted, ranked):
    """Steps down the gradient of the loss raise right documents above wrong ones."""
    searcher, table = fitted.searcher, _table(fitted, _chosen(fitted, ranked))
    batches = RankedBatches(_FirstStage(table.tokens[:, 0]), table, rows=4, seed=0)
    model = NgramMarginModel(
        searcher.ranker.model, generation=0.0, rank=1.0, margin=20.0, drawn_margin=20.0
    )
    step = jax.jit(jax.value_and_grad(lambda params, batch: model.loss_fn(params, batch)[0]))
    params, losses = searcher.params, []
    before = np.asarray(jax.jit(model.scores)(params, batches[0]))
    for _ in range(12):
        loss, gradient = step(params, batches[0])
        losses.append(float(loss))
        norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
        rate = 0.1 / max(norm, 1e-9)  # it is 0 once all margins are kept
        params = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, gradient)
    after = np.asarray(jax.jit(model.scores)(params, batches[0]))
    assert losses[-1] < losses[0]
    assert (after[:, 0] - after[:, 1]).mean() > (before[:, 0] - before[:, 1]).mean()


@pytest.fixture(scope="module")
def training(run):
    """Of the run's first stage."""
    recipe = _recipe()
    split = split_corpus(tiny_corpus(), recipe.data, seed=0)
    return NgramTraining.of(tiny_corpus(), split, recipe, NgramSettings(**SETTINGS), run / "index")


def test_a_train_query_is_not_found_by_itself(training, fitted, monkeypatch):
    """Its own words stand in the index, as those of no query do that will be asked."""
    asked = []
    monkeypatch.setattr(
        "genret_jax.ngram.searcher.sum_documents",
        lambda found, index, weighting, *, without: asked.append(list(without)) or "sums",
    )
    own, query = stage._OwnTexts(training), training.materials.split.pairs[3][0]
    ranker, params = training.ranker, fitted.searcher.params
    for parts in ranker.explain(params, [query, "a query of none"], own=[own(query), own("?")]):
        assert set(parts) == set(VIEWS)
    view = training.texts[2]
    assert view.name == "queries" and len(asked[2]) == 1
    assert view.texts[asked[2][0]].tolist() == list(ranker.vocabulary.encode(query))
    assert [asked[i] for i in (0, 1, 3, 4, 5)] == [[]] * 5, "other views, and an unknown query"


def test_ranking_ends_with_its_part_of_the_time(training, fitted, monkeypatch):
    """And each query comes with its own texts, once."""
    positives = known_positives(training.materials.split.all_pairs)
    explain, seen = training.ranker.explain, []

    def noted(ranker, params, queries, *, own):
        seen.append((list(queries), own))
        return explain(params, queries, own=own)

    monkeypatch.setattr(type(training.ranker), "explain", noted)
    monkeypatch.setattr(stage, "_CHUNK", 8)
    now = iter(range(0, 10_000, 4))
    clock = Clock(60.0, started=0.0, now=lambda: float(next(now)))
    chosen, rows, asked = stage._violating(training, positives, fitted.searcher.params, clock)
    assert asked == 8 * len(seen) and 8 <= asked < len(positives.queries)
    texts = [query for queries, _ in seen for query in queries]
    assert len(set(texts)) == len(texts) and len(chosen) == len(rows) <= asked
    assert {positives.queries[row] for row in rows} <= set(texts)
    of_own = stage._OwnTexts(training)
    assert all(own == [of_own(q) for q in queries] and all(own) for queries, own in seen)


def test_eight_devices_share_the_queries(fitted, ranked):
    table = _table(fitted, _chosen(fitted, ranked))
    batches = RankedBatches(_FirstStage(np.tile(table.tokens[:, 0], (2, 1))), table, rows=8, seed=0)
    model, params = NgramMarginModel(fitted.searcher.ranker.model), fitted.searcher.params
    loss = jax.jit(lambda params, batch: model.loss_fn(params, batch)[0])
    alone = float(loss(params, batches[1]))
    mesh = partitioning.make_mesh(devices=jax.devices())
    assert mesh.shape["data"] == 8
    spread = partitioning.global_batch(mesh, batches[1])
    placed = partitioning.put(params, jax.tree.map(lambda _: partitioning.replicated(mesh), params))
    assert float(loss(placed, spread)) == pytest.approx(alone, rel=1e-5)


def test_the_run_says_what_it_did(run, fitted):
    about = json.loads((run / "retriever" / "retriever.json").read_text())
    assert about["first_stage"]["steps"] == 30 and about["training"]["steps"] == 50
    second = about["second_stage"]
    assert second["steps"] == 20 and 0 < second["violating"] <= second["queries"] == 39
    records = read_records(run / "ranking" / "metrics.jsonl", up_to=20)
    trained = [record for record in records if record["kind"] == "train"]
    assert all({"rank", "violations", "cross_entropy"} <= set(record) for record in trained)
    dev = [record for record in records if record["kind"] == "dev"]
    assert dev[0]["mrr@10"] == pytest.approx(about["first_stage"]["dev"]["mrr@10"])
    assert about["dev"]["mrr@10"] == pytest.approx(max(record["mrr@10"] for record in dev))
    assert (run / "curves.png").read_bytes() == (run / "ranking" / "curves.png").read_bytes()
    assert fitted.name == "ltrgr-minder"


def test_an_interrupted_run_goes_on_with_what_it_ranked(run, collection, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "retriever")
    monkeypatch.setattr(stage, "_violating", lambda *_: pytest.fail("it ranks once more"))
    again = fit_method(collection, recipe=_recipe(), out=tmp_path / "run")
    before = open_searcher(run)
    assert [h.score for h in again.search(QUERIES[0])] == [
        h.score for h in before.search(QUERIES[0])
    ]
    shutil.rmtree(tmp_path / "run" / "retriever")
    monkeypatch.setattr(stage, "_violating", lambda *_: ([], [], 40))
    shutil.rmtree(tmp_path / "run" / "ranking" / "ranked")
    with pytest.raises(UserError, match="of 40 train queries, none has a right document"):
        fit_method(collection, recipe=_recipe(), out=tmp_path / "run")


def test_recipes_and_what_is_refused(collection, tmp_path, capsys):
    published = load_recipe("ltrgr-minder")
    assert published.contrastive.rank == 0.01 and published.contrastive.margin == 300
    assert NgramSettings(**published.searcher.settings) == NgramSettings(views=VIEWS)
    upon_ngrams = load_recipe("ngram", gin_files=[gin_folder() / "ranked_ngrams.gin"])
    assert upon_ngrams.contrastive == published.contrastive
    parts = with_steps(published, 100)
    assert (parts.train.steps, parts.contrastive.steps) == (70, 30)
    assert with_steps(load_recipe("minder"), 100).train.steps == 100
    start = ["fit", str(collection), "--method", "ltrgr-minder", "--out", str(tmp_path / "run")]
    for lines, message in (
        (["ContrastiveConfig.retrieval = 1.0"], "ContrastiveConfig.retrieval is 1.0"),
        (["ContrastiveConfig.refresh_every = 5"], "ContrastiveConfig.refresh_every is 5"),
        (["ContrastiveConfig.source = 'bm25'"], "ContrastiveConfig.source is 'bm25'"),
        (["SearcherConfig.settings = {'ranked': 0}"], "ranked is 0, but must be a whole number"),
        (
            ["ContrastiveConfig.rank = 0.0", "SearcherConfig.settings = {'ranked': 4}"],
            "ranked is 4, but without ContrastiveConfig.rank",
        ),
    ):
        assert main([*start, *(part for line in lines for part in ("--gin", line))]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    names = ["compare", str(collection), "--methods", "ltrgr-minder", "--steps", "1"]
    assert main([*names, "--out", str(tmp_path / "table")]) == 2
    assert "at least 1 a stage" in capsys.readouterr().err


def test_what_can_be_known_is_told_before_anything_is_trained(training, monkeypatch):
    two = functools.partial(partitioning.make_mesh, devices=jax.devices()[:2])
    monkeypatch.setattr(partitioning, "make_mesh", two)
    stage.check_ranking(training)
    settings = dataclasses.replace(training.settings, ranked=3)
    with pytest.raises(UserError, match="ranked 3 does not divide by the 2 devices"):
        stage.check_ranking(dataclasses.replace(training, settings=settings))
    materials = training.materials
    contrastive = dataclasses.replace(materials.recipe.contrastive, batch_size=5)
    recipe = dataclasses.replace(materials.recipe, contrastive=contrastive)
    odd = dataclasses.replace(training, materials=dataclasses.replace(materials, recipe=recipe))
    with pytest.raises(UserError, match="batch_size 5 does not divide"):
        stage.check_ranking(odd)
    nothing = dataclasses.replace(materials, split=dataclasses.replace(materials.split, pairs=[]))
    with pytest.raises(UserError, match="and the corpus has none; take another method"):
        stage.check_ranking(dataclasses.replace(training, materials=nothing))
