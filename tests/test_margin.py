"""LTRGR: its loss by hand, what it promises, its negatives, and a whole run."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAST, asked_questions, tiny_corpus

from genret_jax import cli
from genret_jax.cli import main
from genret_jax.corpus import write_corpus
from genret_jax.data.contrastive import ContrastiveBatches
from genret_jax.errors import UserError
from genret_jax.fit import fit
from genret_jax.indexing import Index
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.margin import MarginModel, margin_rank
from genret_jax.modeling.model import RetrievalModel
from genret_jax.negatives import Negatives
from genret_jax.recipe import load_recipe
from genret_jax.retriever import Retriever
from genret_jax.splitting import split_corpus
from genret_jax.stages.common import Materials
from genret_jax.training.journal import read_records
from genret_jax.vocabularies import DocidSpace

pytestmark = pytest.mark.usefixtures("one_device")

ROWS = st.lists(
    st.tuples(*[st.floats(-9, 0, width=32)] * 3, st.booleans(), st.booleans()),
    min_size=1,
    max_size=5,
)


# ---- the loss


@given(ROWS)
def test_the_loss_is_that_of_a_plain_loop(rows):
    positive, top, drawn, has_top, has_drawn = (np.array(x) for x in zip(*rows, strict=True))
    out = margin_rank(
        *(jnp.asarray(x, jnp.float32) for x in (positive, top, drawn)),
        margin=3.0,
        drawn_margin=4.0,
        top_mask=jnp.asarray(has_top),
        drawn_mask=jnp.asarray(has_drawn),
    )
    first = [
        max(0.0, n - p + 3) for p, n, there in zip(positive, top, has_top, strict=True) if there
    ]
    second = [
        max(0.0, n - p + 4) for p, n, there in zip(positive, drawn, has_drawn, strict=True) if there
    ]
    expected = sum(0.5 * np.mean(terms) for terms in (first, second) if terms)
    assert float(out.loss) == pytest.approx(expected, abs=1e-4)
    assert float(out.weight) == has_top.sum()


def test_a_row_that_keeps_its_margins_passes_no_gradient():
    positive = jnp.array([-1.0, -1.0, -1.0])
    top, drawn = jnp.array([-4.5, -3.5, -9.0]), jnp.array([-5.5, -9.0, -4.0])

    def loss(*scores):
        return margin_rank(*scores, margin=3.0, drawn_margin=4.0).loss

    gradient = jax.grad(loss, argnums=(0, 1, 2))(positive, top, drawn)
    sixth = 0.5 / 3
    np.testing.assert_allclose(gradient[0], [0, -sixth, -sixth], atol=1e-6)
    np.testing.assert_allclose(gradient[1], [0, sixth, 0], atol=1e-6)
    np.testing.assert_allclose(gradient[2], [0, 0, sixth], atol=1e-6)
    out = margin_rank(positive, top, drawn, margin=3.0, drawn_margin=4.0)
    assert float(out.parts["violations"]) == pytest.approx(1 / 3)


def test_the_loss_falls_with_every_rank_that_is_mended():
    """The right document passes five wrong ones, one after the other, until none is near."""
    wrong = jnp.array([-1.0, -2.0, -3.0, -4.0, -5.0])
    losses = []
    for place in (-5.5, -4.5, -3.5, -2.5, -1.5, -0.5):  # last of six .. first
        score = jnp.full(5, place)
        out = margin_rank(score, wrong, wrong - 1, margin=0.5, drawn_margin=0.5)
        losses.append(float(out.loss))
    assert all(later < before for before, later in zip(losses[:-1], losses[1:], strict=True))
    assert losses[-1] == 0, "first, by the margin"
    beyond = margin_rank(score + 1, wrong, wrong - 1, margin=0.5, drawn_margin=0.5)
    assert float(beyond.loss) == 0, "more is not asked for"


CONFIG = T5Config(
    vocab_size=26,
    embed_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
)


def test_scores_are_the_log_probabilities_of_whole_docids():
    model = RetrievalModel(CONFIG, DocidSpace(20, 6))
    params = jax.jit(lambda rng: model.init(rng)[0])(jax.random.key(0))
    # Local ids from 2 up; the shorter ones end in EOS, 1.
    docids = np.array([[2, 3, 1], [4, 1, 0], [5, 2, 1], [3, 1, 0], [2, 2, 1]], np.int32)
    rng = np.random.default_rng(0)
    own, others = np.array([0, 1, 2, 3]), np.array([[1, 2], [4, 0], [3, -1], [0, 1]])
    targets = np.asarray(model.docids.to_model(docids[own]))
    batch = {
        "encoder_input_tokens": rng.integers(2, 20, (4, 5)).astype(np.int32),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": (docids[own] > 0).astype(np.float32),
        "document_index": own.astype(np.int32),
        "document_row": own.astype(np.int32),
        "relevant_index": np.array([[-1], [4], [-1], [-1]], np.int32),
        "negative_document_index": others.astype(np.int32),
        "negative_document_row": others.astype(np.int32),
        "negative_document_docids": docids[others],
    }
    score = jax.jit(model.score)
    positive = np.asarray(score(params, batch["encoder_input_tokens"], docids[own]))
    found = [np.asarray(score(params, batch["encoder_input_tokens"], docids[o])) for o in others.T]
    first = [found[0][i] - positive[i] + 1 for i in (0, 2, 3)]  # the second's answers its query
    second = [found[1][i] - positive[i] + 2 for i in (0, 1, 3)]  # the third has none
    rank = 0.5 * np.maximum(first, 0).mean() + 0.5 * np.maximum(second, 0).mean()
    cross_entropy = -positive.sum() / (docids[own] > 0).sum()
    margin = MarginModel(model, generation=0.5, rank=2.0, margin=1.0, drawn_margin=2.0)
    loss, metrics = jax.jit(margin.loss_fn)(params, batch)
    assert float(metrics["rank"]) == pytest.approx(rank, rel=1e-4) and rank > 0
    assert float(metrics["cross_entropy"]) == pytest.approx(cross_entropy, rel=1e-4)
    assert float(loss) == pytest.approx(0.5 * cross_entropy + 2.0 * rank, rel=1e-4)


def test_the_first_negative_is_the_best_ranked_and_the_second_is_drawn():
    ranked = np.array([[7, 3, 5, -1], [4, -1, -1, -1], [-1, -1, -1, -1]], np.int32)
    batches = ContrastiveBatches.__new__(ContrastiveBatches)
    batches._counts, batches._top_first = (0, 2), True
    drawn = [batches._retrieved(ranked, np.random.default_rng(seed)) for seed in range(20)]
    for found in drawn:
        assert found[:, 0].tolist() == [7, 4, -1] and found[1:, 1].tolist() == [-1, -1]
    assert {found[0, 1] for found in drawn} == {3, 5}


# ---- a whole run

BINDINGS = (
    *FAST,
    "TrainConfig.start = 'random'",
    "TrainConfig.steps = 10",
    "TrainConfig.evaluations = 1",
    "ContrastiveConfig.steps = 8",
    "ContrastiveConfig.evaluations = 1",
    "ContrastiveConfig.learning_rate = 1e-2",
)


def test_a_run_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "log_to_stderr", lambda: None)
    write_corpus(tiny_corpus(), tmp_path / "data")
    recipe = load_recipe("ltrgr", bindings=BINDINGS)
    retriever = fit(tmp_path / "data", recipe=recipe, out=tmp_path / "run")
    about = json.loads((tmp_path / "run" / "retriever" / "retriever.json").read_text())
    assert about["training"]["steps"] == 18 and about["second_stage"]["steps"] == 8
    assert "fusion" not in about and retriever.vectors is None
    records = read_records(tmp_path / "run" / "ranking" / "metrics.jsonl", up_to=99)
    last = [r for r in records if r["kind"] == "train"][-1]
    assert {"rank", "violations", "cross_entropy"} <= set(last)
    found = Negatives.load(tmp_path / "run" / "ranking" / "negatives" / "0").retrieved
    relevant: dict[str, set[int]] = {}
    for query, position in tiny_corpus().pairs("train"):
        relevant.setdefault(query, set()).add(position)
    for row, known in zip(found.tolist(), relevant.values(), strict=False):
        assert not set(row) & known
    split = split_corpus(tiny_corpus(), recipe.data, seed=recipe.train.seed)
    index = Index.load(tmp_path / "run" / "index")
    materials = Materials(tiny_corpus().documents, split, index, recipe)
    asked = asked_questions(materials, range(8))
    assert np.flatnonzero(found[:, 0] >= 0).tolist() == asked, "all of them, and no others"
    hits = retriever.search("bread from an oven", k=8)
    assert [h.score for h in hits] == [h.generation for h in hits] and len(hits) == 8
    before = (tmp_path / "run" / "retriever" / "model.safetensors").stat().st_mtime_ns
    fit(tmp_path / "data", recipe=recipe, out=tmp_path / "run")
    after = (tmp_path / "run" / "retriever" / "model.safetensors").stat().st_mtime_ns
    assert before == after, "a finished run is not trained again"
    assert isinstance(Retriever.load(tmp_path / "run"), Retriever)
    assert main(["search", str(tmp_path / "run"), "bread", "--scoring", "semantic"]) == 2
    assert "needs document vectors" in capsys.readouterr().err
    both = load_recipe("ltrgr", bindings=[*BINDINGS, "ContrastiveConfig.prefix = 0.1"])
    with pytest.raises(UserError, match="rank goes with neither prefix nor retrieval"):
        fit(tmp_path / "data", recipe=both, out=tmp_path / "both")
