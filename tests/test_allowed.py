"""What may follow a prefix of a docid, and the loss, score and search that are made of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_oracles import (
    ATOMIC,
    LENGTH,
    NESTED,
    SHARED,
    SINGLE,
    SKEWED,
    VOCAB,
    make_trie,
    roomy,
    sequence_sets,
)
from hypothesis import example, given, settings
from tiny import SMALL_NETWORK

from genret_jax.docids.table import DocidTable
from genret_jax.errors import UserError
from genret_jax.modeling.allowed import allowed_tokens
from genret_jax.modeling.model import RetrievalModel
from genret_jax.recipe import load_generator_recipe, load_recipe
from genret_jax.trie import build_trie
from genret_jax.vocabularies import DocidSpace

MOST = 30
compiled = jax.jit(allowed_tokens, static_argnums=2)


def brute(ids, inputs: list[int]) -> list[set[int]]:
    """By looking through all identifiers; `inputs` without the 0 that a decoder begins with."""
    anything = set(range(1, VOCAB))
    found = []
    for place in range(len(inputs) + 1):
        prefix = tuple(inputs[:place])
        after = {i[place] for i in ids if i[:place] == prefix and len(i) > place}
        found.append(after or anything)
    return found


@settings(max_examples=60)
@given(sequences=sequence_sets(), wrong=st.lists(st.integers(2, 5), max_size=LENGTH - 1))
@example(sequences=SINGLE, wrong=[2])
@example(sequences=NESTED, wrong=[2, 4, 3])
@example(sequences=SHARED, wrong=[2, 3, 3])
@example(sequences=SKEWED, wrong=[2, 2, 2])
@example(sequences=ATOMIC, wrong=[5, 5])
def test_allowed_are_the_tokens_of_identifiers_with_that_prefix(sequences, wrong):
    trie, ids = make_trie(sequences)
    asked = [list(row)[: LENGTH - 1] for row in ids] + [wrong]
    inputs = np.zeros((MOST, LENGTH), np.int32)
    for row, tokens in zip(inputs, asked, strict=False):
        row[1 : 1 + len(tokens)] = tokens
    for device in (roomy(trie), trie.on_device()):
        found = np.asarray(compiled(device, inputs, VOCAB))
        for row, tokens in zip(found, asked, strict=False):
            expected = brute(ids, tokens)
            for place, mask in enumerate(row[: len(tokens) + 1]):
                assert set(np.flatnonzero(mask).tolist()) == expected[place], (tokens, place)
    assert not found[..., 0].any(), "padding is never written"


# ---- the model

CONFIG = dataclasses.replace(SMALL_NETWORK, vocab_size=40)
DOCIDS = DocidSpace(26, 10)
SEQUENCES = [[2, 3], [2, 4], [2, 4, 5], [3], [4, 9, 9, 2], [4, 9, 9, 3], [5, 2], [5, 3], [2, 4]]


@functools.cache
def trie():
    labels = ["<pad>", "</s>", *(f"t{i}" for i in range(2, 10))]
    table = DocidTable.from_sequences(SEQUENCES, range(len(SEQUENCES)), labels, "test", {})
    return build_trie(table)


@functools.cache
def model(**changed) -> RetrievalModel:
    return RetrievalModel(CONFIG, DOCIDS, normaliser="children", trie=trie().on_device(), **changed)


@functools.cache
def params():
    shapes, _ = jax.eval_shape(model().init, jax.random.key(1))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(scale=0.7, size=x.shape).astype(np.float32), shapes)


def queries() -> np.ndarray:
    return np.random.default_rng(2).integers(3, 26, (4, 6)).astype(np.int32)


def batch_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    targets = np.asarray(DOCIDS.to_model(rows))
    return {
        "encoder_input_tokens": np.resize(queries(), (len(rows), 6)),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def test_the_probabilities_of_all_identifiers_sum_to_one():
    score = jax.jit(model().score)
    scores = np.stack([score(params(), queries(), np.tile(r, (4, 1))) for r in trie().rows])
    np.testing.assert_allclose(np.exp(scores).sum(0), 1.0, rtol=1e-5)
    assert np.exp(scores).max() < 0.999
    free = dataclasses.replace(model(), normaliser="vocabulary", trie=None)
    there = [jax.jit(free.score)(params(), queries(), np.tile(r, (4, 1))) for r in trie().rows]
    assert np.exp(there).sum(0).max() < 0.9, "over the vocabulary much goes to what does not exist"


@pytest.mark.parametrize("beam", [3, len(SEQUENCES)])
def test_search_and_score_agree(beam):
    found = jax.jit(functools.partial(model().search, beam=beam))(
        params(), queries(), trie().on_device()
    )
    for place, valid in itertools.product(range(beam), [np.asarray(found.valid)]):
        rows = trie().rows[np.asarray(found.row[:, place])]
        expected = jax.jit(model().score)(params(), queries(), rows.astype(np.int32))
        agree = np.isclose(found.scores[:, place], expected, atol=1e-4)
        assert (agree | ~valid[:, place]).all()


def test_the_loss_counts_what_is_allowed_alone():
    rows = trie().rows.astype(np.int32)
    batch = batch_of(rows)
    free = dataclasses.replace(model(), normaliser="vocabulary", trie=None)
    logits = np.asarray(free.teacher_forced(params(), batch), np.float64)
    ids = [tuple(row[row > 0].tolist()) for row in rows]
    total, count = 0.0, 0
    for row, tokens in enumerate(ids):
        for place, after in enumerate(brute(ids, list(tokens[:-1]))):
            some = logits[row, place, sorted(after)]
            total += np.log(np.exp(some).sum()) - logits[row, place, tokens[place]]
            count += 1
    loss, parts = model().loss_fn(params(), batch)
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    assert float(parts["cross_entropy"]) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("changed", [{"label_smoothing": 0.1}, {"z_loss": 1e-3}, {"r_drop": 0.5}])
def test_gradients_are_numbers_and_leave_the_rest_alone(changed):
    rows = trie().rows.astype(np.int32)
    only = rows[[r[:3].tolist() == [4, 9, 9] for r in rows]]  # of its four tokens two are a choice
    gradient = jax.grad(lambda p: model(**changed).loss_fn(p, batch_of(only), jax.random.key(0))[0])
    found = gradient(params())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    kernel = np.asarray(found["decoder"]["logits_dense"]["kernel"])
    touched = np.flatnonzero(np.abs(kernel).sum(0) > 1e-7)
    choices = {2, 3, 4, 5}  # of the first token, and of the last
    if "z_loss" in changed:
        choices |= {9, 1}  # the normaliser of a token without choice is pulled, too
    assert set(touched) <= {*DOCIDS.to_model(np.array(sorted(choices))).tolist(), 1}


def test_nothing_is_learned_after_the_last_choice():
    """A loss over docids that are cut there is the same sum over fewer tokens."""
    end = trie().choices_end
    rows = trie().rows.astype(np.int32)
    assert end == 4 < rows.shape[1] and trie().report()["width_max"][-1] == 2
    whole, cut = (model().loss_fn(params(), batch_of(r))[0] for r in (rows, rows[:, :end]))
    tokens = [(r > 0).sum() for r in (rows, rows[:, :end])]
    assert tokens[1] < tokens[0]
    assert float(cut) * tokens[1] == pytest.approx(float(whole) * tokens[0], rel=1e-5)


def test_without_a_trie_there_are_no_children():
    lost = dataclasses.replace(model(), trie=None)
    with pytest.raises(ValueError, match="needs the trie"):
        lost.loss_fn(params(), batch_of(trie().rows.astype(np.int32)))
    with pytest.raises(ValueError, match="normaliser must be one of"):
        dataclasses.replace(model(), normaliser="none")


# ---- the recipe


def test_recipes_say_what_is_normalised_over():
    for method in ("dogr", "dsi", "dsi-rq", "genre", "ltrgr", "nci"):
        assert load_recipe(method).loss.normaliser == "children", method
    with pytest.raises(UserError, match=r"LossConfig\.normaliser"):
        load_recipe("dsi", bindings=["LossConfig.normaliser = 'all'"])
    children = "LossConfig.normaliser = 'children'"
    for method in ("glen", "ngram", "dense"):
        assert load_recipe(method).loss.normaliser == "vocabulary"
        with pytest.raises(UserError, match="no docids in a trie while it trains"):
            load_recipe(method, bindings=[children])
    with pytest.raises(UserError, match="a generator of queries has no such"):
        load_generator_recipe(bindings=[children])


def test_bfloat16_logits_are_masked_alike():
    half = dataclasses.replace(model(), config=dataclasses.replace(CONFIG, dtype="bfloat16"))
    batch = batch_of(trie().rows.astype(np.int32))
    ours = jnp.isfinite(half.teacher_forced(params(), batch))
    np.testing.assert_array_equal(ours, jnp.isfinite(model().teacher_forced(params(), batch)))
