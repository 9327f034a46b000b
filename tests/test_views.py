"""Views of documents: pieces that cover the text, queries that are never their own positive."""

from __future__ import annotations

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genret_jax.data.examples import Ragged
from genret_jax.data.views import Views, make_views
from genret_jax.docids.table import EOS_ID as EOS


def examples(titles, bodies, queries=(), owners=()):
    """What `make_views` reads of TrainingExamples."""
    return types.SimpleNamespace(
        titles=Ragged.of(titles),
        bodies=Ragged.of(bodies),
        queries=Ragged.of(list(queries)),
        query_documents=np.array(owners, np.int32),
        document_rows=np.zeros(len(titles), np.int32),
    )


def made(*arguments, length=8, pieces=4, queries=4, query_of=()):
    return make_views(
        examples(*arguments), np.array(query_of), length=length, pieces=pieces, queries=queries
    )


def texts(views):
    return [[t for t in row if t] for row in views.tokens.tolist()]


def test_a_short_document_is_one_piece_with_its_title_and_its_queries():
    views = made([[5, 6]], [[7, 8]], [[9], [10, 11]], [0, 0], query_of=[3, 1])
    assert texts(views) == [[5, 6, 7, 8, EOS], [9, EOS], [10, 11, EOS]]
    assert views.questions.tolist() == [-1, 3, 1]
    assert views.bounds.tolist() == [[0, 1], [3, 3]] and views.owners.tolist() == [0, 0, 0]


@given(
    st.lists(st.integers(10, 99), max_size=40),
    st.lists(st.integers(2, 9), max_size=6),
    st.integers(4, 16),
)
def test_pieces_cover_the_text_where_there_are_enough(body, title, length):
    views = made([title], [body], length=length, pieces=99)
    covered = set()
    for piece in texts(views):
        assert len(piece) <= length and piece[-1] == EOS
        head = title[: max(1, length // 3)]
        assert piece[: len(head)] == head[: length - 1]
        rest, text = piece[len(head) : -1], title[len(head) :] + body
        starts = [s for s in range(len(text) + 1) if text[s : s + len(rest)] == rest]
        assert starts, "a piece is the title's beginning and a window of the rest"
        covered |= set(piece[:-1])
    assert covered == set(title) | set(body), "the tail of a title, too"


def test_a_title_has_all_the_room_that_the_text_leaves():
    title = list(range(10, 16))
    assert texts(made([title], [[]])) == [[*title, EOS]]
    assert texts(made([title], [[7]])) == [[*title, 7, EOS]]
    first, *others = texts(made([title], [list(range(20, 40))], pieces=99))
    assert first == [*title, 20, EOS] and all(p[:2] == [10, 11] for p in others)


def test_pieces_and_queries_are_limited_and_evenly_spread():
    body = list(range(100, 200))
    queries = [[i] for i in range(20, 30)]
    views = made(
        [[]], [body], queries, [0] * 10, length=11, pieces=4, queries=3, query_of=range(10)
    )
    assert [t[0] for t in texts(views)[:4]] == [100, 130, 160, 190]
    assert [t[0] for t in texts(views)[4:]] == [20, 23, 26]


def test_equal_queries_of_a_document_count_once():
    views = made([[5], [6]], [[], []], [[9], [9], [9]], [1, 1, 0], query_of=[0, 0, 0])
    assert texts(views) == [[5, EOS], [9, EOS], [6, EOS], [9, EOS]]


def test_a_document_without_text_has_a_piece_all_the_same():
    assert texts(made([[], []], [[], [7]])) == [[EOS], [7, EOS]]


@pytest.fixture(scope="module")
def three():
    """Documents with no query, with one, and with several."""
    queries, owners = [[20], [21], [22], [23]], [1, 2, 2, 2]
    bodies = [list(range(30, 50)), [50], list(range(60, 80))]
    return made([[2], [3], [4]], bodies, queries, owners, query_of=[0, 1, 2, 3])


def test_draws_are_of_the_document_of_both_kinds_and_never_the_question(three):
    documents = np.tile([0, 1, 2, -1], (500, 1))
    question = np.repeat([1, 0], 250)[:, None]
    rows = three.draw(documents, question, np.random.default_rng(0))
    assert rows.shape == (500, 4)
    assert (three.owners[rows] == np.maximum(documents, 0)).all()
    assert not (three.questions[rows] == question).any()
    asked = (three.questions[rows] >= 0).mean(0)
    assert asked[0] == asked[3] == 0 and asked[2] == pytest.approx(0.41, abs=0.08)
    for document, number in ((0, 7), (1, 2), (2, 10)):
        drawn = set(rows[:, document].tolist())
        assert drawn == set(np.flatnonzero(three.owners == document)) and len(drawn) <= number


def test_some_of_the_views(three):
    rows = three.at_most(2)
    few = Views(three.tokens[rows], three.questions[rows], three.bounds_of(rows))
    counts = np.diff(np.append(few.bounds[:-1].reshape(-1), few.bounds[-1, 0]))
    assert counts.tolist() == [2, 0, 1, 1, 2, 2]
    assert (few.owners == three.owners[rows]).all() and (few.bounds[-1] == len(rows)).all()
    assert texts(few) == [texts(three)[row] for row in rows]
