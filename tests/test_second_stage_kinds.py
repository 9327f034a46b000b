"""Stage 2 with other kinds of docids and vectors."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny import FAST, tiny_corpus

from genret_jax.indexing import build_index
from genret_jax.recipe import load_recipe
from genret_jax.splitting import split_corpus
from genret_jax.stages.common import Materials
from genret_jax.stages.second import train_ranking
from genret_jax.training.budget import Clock
from genret_jax.training.journal import read_records
from genret_jax.weights import load_weights, save_weights

pytestmark = pytest.mark.usefixtures("one_device", "quiet")

QUERY = "bread from an oven"


@pytest.mark.parametrize(
    ("docids", "more"),
    [
        # One token; several, of many lengths; several of one length, with prefixes in common. All
        # seven kinds were tried once by hand: they differ in nothing else here.
        ("atomic", ("vector = 'encoder_mean'", "learned_temperature = True")),
        ("title", ("vector = 'decoder_mean'", "similarity = 'dot'", "store = 'bfloat16'")),
        ("hierarchical", ("source = 'bm25'", "store = 'int8'", "chunk = 12")),
    ],
)
def test_kinds_of_docids_and_vectors(docids, more, tmp_path):
    lines = (
        *FAST,
        "ContrastiveConfig.learning_rate = 1e-2",
        "ContrastiveConfig.steps = 4",
        "ContrastiveConfig.evaluations = 1",
        f"DocidConfig.kind = '{docids}'",
        "DocidConfig.settings = {}",
        *(f"ContrastiveConfig.{line}" for line in more),
    )
    recipe = load_recipe("dogr", bindings=lines)
    config, corpus = recipe.contrastive, tiny_corpus()
    index = build_index(
        corpus, tmp_path / "index", docids=recipe.docids, vocabulary=recipe.vocabulary
    )
    split = split_corpus(corpus, recipe.data, seed=recipe.train.seed)
    materials = Materials(corpus.documents, split, index, recipe)
    params = jax.device_get(materials.model.init(jax.random.key(0))[0])
    second = train_ranking(materials, params, tmp_path / "ranking", Clock(None))
    assert second.vectors.store == config.store
    assert second.report["negatives"]["source"] == config.source

    ranker = materials.ranker(second.fusion)
    (hits,) = ranker.rank(
        second.result.params,
        [QUERY],
        k=8,
        beam=8,
        similarities=second.vectors.of_several,
        scoring="fused",
    )
    assert len(hits) == 8 and np.isfinite([hit.fused for hit in hits]).all()
    tokens = ranker.vocabulary.encode_batch([QUERY], ranker.input_length)
    query = np.asarray(materials.model.vectors(second.result.params, tokens))[0]
    query = query / np.linalg.norm(query) if config.similarity == "cosine" else query
    for hit in hits:
        begin, middle = second.vectors.bounds[hit.position]
        end = second.vectors.bounds[hit.position + 1, 0]
        text, asked = (
            (second.vectors.rows(np.arange(a, b)) @ query).max()
            for a, b in ((begin, middle), (middle, end))
        )
        share = second.fusion.query_share
        semantic = (1 - share) * text + share * asked
        assert hit.semantic == pytest.approx(semantic, rel=1e-4, abs=1e-5)

    records = read_records(tmp_path / "ranking" / "metrics.jsonl", up_to=99)
    temperatures = [r["temperature"] for r in records if "temperature" in r]
    assert bool(temperatures) == config.learned_temperature
    if temperatures:  # the mean over the steps logged together
        assert temperatures[-1] == pytest.approx(config.temperature, rel=0.1)
        assert temperatures[-1] != pytest.approx(config.temperature, rel=1e-4)


def test_a_learned_temperature_is_saved_with_the_weights(tmp_path):
    """It is the one parameter without axes."""
    save_weights({"a": {"b": np.ones((2, 3))}, "log_temperature": np.float32(-0.5)}, tmp_path / "w")
    found = load_weights(tmp_path / "w")
    assert found["log_temperature"].shape == () and found["log_temperature"] == -0.5
    assert found["a"]["b"].shape == (2, 3)
