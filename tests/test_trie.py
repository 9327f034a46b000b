"""The trie against dictionaries: children, leaves, documents, bounds, and its two other forms."""

from __future__ import annotations

import itertools
import json

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings

from genret_jax.device_trie import bucket
from genret_jax.docids.table import DocidTable
from genret_jax.errors import UserError
from genret_jax.trie import Trie, build_trie, lexicographic_order, token_type

VOCAB = 40
LABELS = ["<pad>", "</s>", *(f"t{i}" for i in range(2, VOCAB))]
ARRAYS = (
    "first_edge",
    "edge_token",
    "row_begin",
    "level_start",
    "rows",
    "row_offsets",
    "row_documents",
)


def table_of(sequences, documents=None) -> DocidTable:
    documents = range(len(sequences)) if documents is None else documents
    return DocidTable.from_sequences(sequences, list(documents), LABELS, "test", {})


def identifiers(table: DocidTable) -> dict[tuple[int, ...], list[int]]:
    """Identifier, EOS included -> its documents in ascending order."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, length, document in zip(table.tokens, table.lengths, table.documents, strict=True):
        found.setdefault(tuple(row[:length].tolist()), []).append(int(document))
    return {ids: sorted(documents) for ids, documents in found.items()}


def walk(trie) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """Every prefix that has a state -> (state, its first row, the row after its last)."""
    first, tokens, begins = (
        np.asarray(a) for a in (trie.first_edge, trie.edge_token, trie.row_begin)
    )
    total = int(trie.num_rows) if hasattr(trie, "num_rows") else len(trie.rows)
    reached, todo = {}, [((), 0, total)]
    while todo:
        prefix, state, end = todo.pop()
        assert prefix not in reached, "two edges of one state write the same token"
        reached[prefix] = (state, int(begins[state]), end)
        edges = range(first[state], first[state + 1])
        for edge in edges:
            ends = end if edge + 1 == first[state + 1] else int(begins[edge + 2])
            todo.append(((*prefix, int(tokens[edge])), edge + 1, ends))
    return reached


def prefixes(ids) -> set[tuple[int, ...]]:
    return {i[:n] for i in ids for n in range(len(i) + 1)}


def sequence_sets(max_size: int = 30):
    """Few tokens, so that prefixes, equal rows and one-inside-another all happen; or many."""
    few, many = st.integers(2, 5), st.integers(2, VOCAB - 1)
    sequence = st.one_of(
        st.lists(few, min_size=1, max_size=4),
        st.lists(many, min_size=1, max_size=2),
        st.lists(few, min_size=3, max_size=3),
    )
    return st.lists(sequence, min_size=1, max_size=max_size)


# --- structure ---------------------------------------------------------------------------------


@settings(max_examples=150)
@given(sequences=sequence_sets(), data=st.data())
@example(sequences=[[2]], data=None)
@example(sequences=[[2], [2, 3], [2, 3, 4]], data=None)
@example(sequences=[[2, 3]] * 3, data=None)
def test_the_trie_is_the_dictionary_of_prefixes(sequences, data):
    number = st.lists(st.integers(0, 50), min_size=len(sequences), max_size=len(sequences))
    documents = data.draw(number) if data is not None else None
    table = table_of(sequences, documents)
    expected = identifiers(table)
    trie = build_trie(table)
    reached = walk(trie)

    several = {p for p in prefixes(expected) if sum(i[: len(p)] == p for i in expected) > 1}
    assert set(reached) == {(), *(p for p in prefixes(expected) if p[:-1] in several)}
    assert trie.num_states == len(reached)
    assert trie.max_length == table.tokens.shape[1]
    ordered = sorted(expected)
    for prefix, (_, begin, end) in reached.items():
        under = [i for i in ordered if i[: len(prefix)] == prefix]
        assert ordered[begin:end] == under, "a state is the range of the rows that begin with it"
    for row, identifier in enumerate(ordered):
        assert trie.documents(row).tolist() == expected[identifier]
    assert [tuple(r[r > 0].tolist()) for r in trie.rows] == sorted(expected)
    assert trie.row_offsets[-1] == len(trie.row_documents) == len(table.documents)


@settings(max_examples=60)
@given(sequence_sets())
def test_states_are_numbered_breadth_first_and_levels_say_where(sequences):
    trie = build_trie(table_of(sequences))
    reached = walk(trie)
    by_state = sorted(reached, key=lambda prefix: reached[prefix][0])
    assert by_state == sorted(reached, key=lambda prefix: (len(prefix), prefix))
    assert [reached[p][0] for p in by_state] == list(range(trie.num_states))
    counts = np.bincount([len(p) for p in by_state])
    assert np.diff(trie.level_start).tolist() == counts.tolist()


def test_a_small_trie_by_hand():
    """[2], [2, 3], [4]: variable lengths, so EOS ends each; [2] is inside [2, 3] before that."""
    trie = build_trie(table_of([[2, 3], [4], [2]], [10, 11, 12]))
    # states: 0 root | 1 "2", 2 "4" | 3 "2 </s>", 4 "2 3"; "4" and "2 3" go one way from here on.
    assert trie.first_edge.tolist() == [0, 2, 4, 4, 4, 4]
    assert trie.edge_token.tolist() == [2, 4, 1, 3]
    assert trie.row_begin.tolist() == [0, 0, 2, 0, 1]
    assert trie.level_start.tolist() == [0, 1, 3, 5]
    assert trie.rows.tolist() == [[2, 1, 0], [2, 3, 1], [4, 1, 0]]
    assert [trie.documents(r).tolist() for r in range(3)] == [[12], [10], [11]]
    assert trie.documents(-1).tolist() == []
    assert trie.rows.dtype == trie.edge_token.dtype == np.uint8


def test_tokens_take_the_narrowest_type_that_holds_the_vocabulary():
    assert [np.dtype(token_type(v)).itemsize for v in (2, 256, 257, 65536, 65537)] == [
        *(1, 1, 2, 2, 4)
    ]


@settings(max_examples=150)
@given(
    rows=st.integers(1, 40),
    length=st.integers(1, 9),
    vocab=st.sampled_from([3, 256, 2048, 40_000, 70_000]),
    most=st.sampled_from([3, 5, 10**6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_packed_order_is_the_lexicographic_one(rows, length, vocab, most, seed):
    """Few tokens make ties in the first key, so that the later keys decide."""
    tokens = np.random.default_rng(seed).integers(0, min(vocab, most), (rows, length))
    tokens = tokens.astype(token_type(vocab))
    order = lexicographic_order(tokens, vocab)
    in_order = sorted(tokens.tolist())
    assert (order is None) == (tokens.tolist() == in_order)
    if order is not None:
        assert sorted(order.tolist()) == list(range(rows))
        assert tokens[order].tolist() == in_order


def test_equal_rows_become_one_row_with_several_documents():
    trie = build_trie(table_of([[3, 3], [2, 2], [3, 3], [3, 3]], [5, 9, 1, 3]))
    assert trie.rows.tolist() == [[2, 2], [3, 3]]
    assert trie.documents(0).tolist() == [9]
    assert trie.documents(1).tolist() == [1, 3, 5]


def test_a_document_may_own_several_rows():
    trie = build_trie(table_of([[3, 3], [2, 2]], [7, 7]))
    assert [trie.documents(r).tolist() for r in range(2)] == [[7], [7]]


def test_one_length_needs_no_eos():
    trie = build_trie(table_of([[2, 3], [4, 5]]))
    assert trie.max_length == 2
    assert 1 not in trie.edge_token


def test_columns_that_no_row_fills_are_harmless():
    """A filtered table may keep the width of the whole one."""
    narrow = table_of([[2, 3], [4]])
    wide = DocidTable(
        tokens=np.pad(narrow.tokens, ((0, 0), (0, 2))),
        lengths=narrow.lengths,
        documents=narrow.documents,
        labels=narrow.labels,
        kind="test",
        settings={},
    )
    assert walk(build_trie(wide)) == walk(build_trie(narrow))
    assert build_trie(wide).on_device().candidates(3, 1) >= 1


# --- errors ------------------------------------------------------------------------------------


def test_a_prefix_of_another_identifier_is_named():
    table = DocidTable(
        tokens=np.array([[2, 3, 4], [7, 8, 0], [7, 8, 9]], np.int32),
        lengths=np.array([3, 2, 3], np.int32),
        documents=np.arange(3, dtype=np.int32),
        labels=tuple(LABELS),
        kind="test",
        settings={},
    )
    with pytest.raises(UserError, match=r"\[7, 8\] is a prefix .*EOS"):
        build_trie(table)


@settings(max_examples=60)
@given(sequence_sets(8))
def test_without_eos_prefixes_are_refused_exactly_where_there_are_some(sequences):
    width = max(map(len, sequences))
    tokens = np.array([s + [0] * (width - len(s)) for s in sequences], np.int32)
    table = DocidTable(
        tokens=tokens,
        lengths=np.array([len(s) for s in sequences], np.int32),
        documents=np.arange(len(sequences), dtype=np.int32),
        labels=tuple(LABELS),
        kind="test",
        settings={},
    )
    pairs = itertools.permutations({tuple(s) for s in sequences}, 2)
    if any(b[: len(a)] == a for a, b in pairs):
        with pytest.raises(UserError, match="is a prefix"):
            build_trie(table)
    else:
        assert len(build_trie(table).rows) == len({tuple(s) for s in sequences})


def test_an_empty_table_is_refused():
    with pytest.raises(UserError, match="at least one identifier"):
        build_trie(table_of([]))


# --- buckets and bounds ------------------------------------------------------------------------


def test_bucket_against_its_definition():
    allowed = sorted({m << e for m in range(4, 8) for e in range(16)})
    for size in range(2000):
        assert bucket(size) == next(b for b in allowed if b >= size)
    assert [bucket(n) for n in (0, 4, 5, 8, 9, 11, 17, 1000, 10**7)] == [
        *(4, 4, 5, 8, 10, 12, 20, 1024),
        5 << 21,
    ]


@settings(max_examples=150)
@given(sequences=sequence_sets(), beam=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@example(sequences=[[2, t] for t in range(2, 40)] + [[3, 2], [4, 2]], beam=2, seed=0)
def test_candidates_bound_the_children_of_any_states_of_one_level(sequences, beam, seed):
    trie = build_trie(table_of(sequences))
    device = trie.on_device()
    children = np.diff(trie.first_edge)
    assert device.candidates(1, 0) >= children[0]
    rng = np.random.default_rng(seed)
    for level, (start, end) in enumerate(itertools.pairwise(trie.level_start)):
        counts = children[start:end]
        assert sorted(counts[counts > 0])[::-1] == trie.children_by_level[level].tolist()
        if level:
            some = rng.permutation(counts)[:beam]
            assert some.sum() <= device.candidates(beam, level)
            assert np.sort(counts)[::-1][:beam].sum() <= device.candidates(beam, level)


def test_candidates_are_not_far_above_the_need():
    """One node of 38 children among narrow ones: its width is paid once, not for every beam."""
    skewed = [[2, t] for t in range(2, 40)] + [[t, u] for t in range(3, 40) for u in (2, 3)]
    device = build_trie(table_of(skewed)).on_device()
    assert device.widths[0] == (bucket(38),)
    # Powers of two above 38, 38 + 7 x 2 and 38 + 37 x 2; no state of a deeper level has a choice.
    assert [device.candidates(beam, 1) for beam in (1, 8, 1000)] == [64, 64, 128]
    assert device.candidates(1000, 2) == 4


def test_the_tail_begins_where_hardly_a_hypothesis_has_a_choice():
    ids = [[a, b, 7, 8, 9, 10] for a in range(2, 10) for b in range(2, 14)]
    assert build_trie(table_of(ids)).on_device().tail(1000) == 4
    ids += [[a, 2, 8, 8, 9, 10] for a in (2, 3, 4)]
    device = build_trie(table_of(ids)).on_device()  # one state of level 2 in 32 has a choice
    assert device.choices[2] == 5
    assert [device.tail(n) for n in (1, 8, 9, 1000)] == [4, 4, 3, 3]
    assert build_trie(table_of([[2, 3, 4]])).on_device().tail(1) == 2
    assert build_trie(table_of([[2, 3], [2, 4]])).on_device().tail(1) == 0


def test_levels_where_most_tokens_are_allowed_are_dense():
    every = [[a, b, 2] for a in range(2, 40) for b in range(2, 40)]
    trie = build_trie(table_of([*every, [2, 2, 3]]))
    root, level1 = trie.on_device().dense
    assert root.shape == (1, VOCAB) and level1.shape == (bucket(38), VOCAB)
    for mask in (root, level1[:38]):
        assert not mask[:, :2].any() and mask[:, 2:].all()
    assert not level1[38:].any()
    few = trie.rows_with(np.arange(len(trie.row_documents)) % 38 == 5)
    root, level1 = trie.on_device(few).dense
    kept = {tuple(r) for r in trie.rows[few].tolist()}
    for a in range(2, 40):
        assert bool(root[0, a]) == any(r[0] == a for r in kept)
        for b in range(2, 40):
            assert bool(level1[a - 2, b]) == any(r[:2] == (a, b) for r in kept)
    assert build_trie(table_of([[2, 3], [4, 5]])).on_device().dense == ()


# --- the other forms ---------------------------------------------------------------------------


@settings(max_examples=60)
@given(sequence_sets())
def test_padding_on_the_device_is_never_reached(sequences):
    trie = build_trie(table_of(sequences))
    device = trie.on_device()
    capacity = bucket(trie.num_states)
    assert device.first_edge.shape == device.row_begin.shape == (capacity + 1,)
    assert device.edge_token.shape == (capacity,)
    assert device.rows.shape == (bucket(len(trie.rows)), trie.max_length)
    assert device.max_length == trie.max_length and device.num_rows == len(trie.rows)
    assert device.num_bytes == sum(x.nbytes for x in jax.tree.leaves(device))
    assert walk(device) == walk(trie)
    beyond = np.arange(trie.num_states, capacity)
    first = np.asarray(device.first_edge)
    assert (first[beyond + 1] == first[beyond]).all(), "a padding state has no children"


@settings(max_examples=60)
@given(sequences=sequence_sets(), seed=st.integers(0, 2**32 - 1))
def test_the_filter_counts_allowed_rows_of_any_range(sequences, seed):
    rng = np.random.default_rng(seed)
    trie = build_trie(table_of(sequences))
    documents = rng.random(len(sequences)) < 0.5
    rows = trie.rows_with(documents)
    assert rows.tolist() == [
        bool(documents[trie.documents(row)].any()) for row in range(len(trie.rows))
    ]
    plain = trie.on_device()
    device = trie.restricted(plain, rows)
    below = np.asarray(device.allowed)
    assert below.shape == (device.rows.shape[0] + 1,)
    for begin, end in itertools.combinations(range(len(rows) + 1), 2):
        assert below[end] - below[begin] == rows[begin:end].sum()
    assert below[-1] == rows.sum()
    assert device.widths == plain.widths and device.choices == plain.choices
    with pytest.raises(ValueError, match="rows must be bool"):
        trie.restricted(plain, rows[:-1])


def test_saved_and_opened_again_memory_mapped(tmp_path):
    trie = build_trie(table_of([[2, 3], [4], [2], [4]], [3, 2, 1, 0]))
    folder = tmp_path / "index" / "trie"
    trie.save(folder)
    loaded = Trie.load(folder)
    for name in ARRAYS:
        ours, theirs = getattr(trie, name), getattr(loaded, name)
        assert isinstance(theirs, np.memmap) and not theirs.flags.writeable
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert walk(loaded.on_device()) == walk(trie)
    assert loaded.report() == trie.report() and loaded.vocab_size == trie.vocab_size == VOCAB
    assert loaded.documents(2).tolist() == [0, 2]
    assert [p.name for p in folder.parent.iterdir()] == ["trie"]
    assert json.loads((folder / "trie.json").read_text())["states"] == trie.num_states


def test_saving_over_a_loaded_trie_keeps_the_loaded_one_readable(tmp_path):
    build_trie(table_of([[2, 3], [4, 5]])).save(tmp_path / "trie")
    loaded = Trie.load(tmp_path / "trie")
    build_trie(table_of([[9, 9]])).save(tmp_path / "trie")
    assert loaded.rows.tolist() == [[2, 3], [4, 5]]
    assert Trie.load(tmp_path / "trie").rows.tolist() == [[9, 9]]


def test_an_incomplete_folder_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no whole trie here.*first_edge"):
        Trie.load(tmp_path / "nowhere")
    build_trie(table_of([[2, 3]])).save(tmp_path / "trie")
    (tmp_path / "trie" / "rows.npy").unlink()
    with pytest.raises(UserError, match=r"\(rows missing\)"):
        Trie.load(tmp_path / "trie")


def test_a_trie_of_another_format_is_a_clear_error(tmp_path):
    build_trie(table_of([[2, 3]])).save(tmp_path / "trie")
    about = json.loads((tmp_path / "trie" / "trie.json").read_text())
    (tmp_path / "trie" / "trie.json").write_text(json.dumps({**about, "format": 1}))
    with pytest.raises(UserError, match="format 1, but this version reads format 2"):
        Trie.load(tmp_path / "trie")


def test_report():
    trie = build_trie(table_of([[2, 3], [2, 4], [2, 5], [6, 7], [6, 7]]))
    assert trie.report() == {
        "states": 6,  # the root, two of one token, three of two; "6" goes on to one row
        "rows": 4,
        "bytes": sum(getattr(trie, name).nbytes for name in ARRAYS),
        "width_max": [2, 3],
        "width_mean": [2.0, 3.0],
    }
    assert trie.num_bytes == 4 * (7 + 6 + 4 + 5 + 5) + 5 + 8
