"""One id space: where everything stands, text in and out, and models made elsewhere."""

from __future__ import annotations

import io
import json
from pathlib import Path

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings

from genret_jax.errors import UserError
from genret_jax.vocabularies import (
    EOS,
    PAD,
    UNK,
    DocidSpace,
    Vocabulary,
    read_text_model,
    train_text_model,
)

TEXTS = [
    "The torch burns gas and the seam joins two sheets.",
    "Where two sheets meet, a seam is welded with the torch.",
    "Gas burns hot and loud; the welder moves the torch along the seam.",
    "Two sheets of steel are joined by welding.",
    "A nurse takes care of the sick and of the old.",
    "The nurse of the ward meets the doctor twice a day.",
]
T5_MODEL = Path(__file__).parents[2] / "shared" / "fixtures" / "t5_vocab" / "spiece.model"


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_text_model(TEXTS, size=120)


@pytest.fixture(scope="module")
def vocabulary(model) -> Vocabulary:
    return Vocabulary(model, docid_size=50)


def train_elsewhere(**options) -> bytes:
    """SentencePiece as its own defaults have it: unknown 0, BOS 1, EOS 2, no padding."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS),
        model_writer=out,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


# --- the layout --------------------------------------------------------------------------------


def test_special_ids_stand_where_t5_has_them(vocabulary):
    assert (PAD, EOS, UNK) == (0, 1, 2)
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(vocabulary.model)
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()) == (0, 1, 2, -1)
    assert vocabulary.text_size == pieces.GetPieceSize()


def test_text_then_docids_then_spare_rows(vocabulary):
    text, docids = vocabulary.text_size, vocabulary.docids
    assert 10 < text <= 120
    assert docids == DocidSpace(start=text, size=50)
    ids = docids.to_model(np.arange(50))
    assert ids[:2].tolist() == [PAD, EOS]
    assert ids[2:].tolist() == list(range(text, text + 48))
    assert vocabulary.size % 128 == 0
    assert text + 48 <= vocabulary.size < text + 48 + 128


def test_rows_of_a_pretrained_embedding_stay_before_the_docids(vocabulary, tmp_path):
    """As T5's 32,000 pieces have 32,128 rows: what no piece has is nobody's."""
    wide = Vocabulary(vocabulary.model, docid_size=50, text_rows=300)
    assert wide.docids == DocidSpace(start=300, size=50)
    assert wide.text_size == vocabulary.text_size < 300
    assert wide.size == 384, "348 rows, rounded up"
    wide.save(tmp_path)
    assert Vocabulary.load(tmp_path) == wide
    assert wide.decode([5, 6, 250, 310]) == vocabulary.decode([5, 6])
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary and vocabulary.text_rows == 0


@pytest.mark.parametrize(("used", "size"), [(128, 128), (129, 256), (256, 256)])
def test_the_number_of_rows_is_rounded_up(vocabulary, used, size):
    exact = Vocabulary(vocabulary.model, docid_size=used - vocabulary.text_size + 2)
    assert exact.size == size


@settings(max_examples=100)
@given(start=st.integers(3, 40_000), size=st.integers(2, 500), data=st.data())
def test_to_local_is_the_inverse_of_to_model(start, size, data):
    space = DocidSpace(start=start, size=size)
    local = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), np.int32)
    ids = space.to_model(local)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(space.to_local(ids), local)
    for here, there in zip(local.tolist(), ids.tolist(), strict=True):
        assert there == (here if here < 2 else start + here - 2)


def test_the_space_works_on_jax_arrays_and_every_local_id_has_its_own_model_id():
    space = DocidSpace(start=100, size=40)
    local = jnp.arange(40).reshape(4, 10)
    ids = space.to_model(local)
    assert ids.shape == (4, 10) and ids.dtype == local.dtype
    assert len(set(ids.ravel().tolist())) == 40
    np.testing.assert_array_equal(space.to_local(ids), local)


# --- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [t.lower() for t in TEXTS] + ["seam torch", "a"])
def test_decode_gives_back_what_encode_read(vocabulary, text):
    ids = vocabulary.encode(text)
    assert ids and all(UNK < i < vocabulary.text_size for i in ids)
    assert vocabulary.decode(ids) == text
    assert len(vocabulary.pieces(text)) == len(ids)
    assert "".join(vocabulary.pieces(text)).replace("▁", " ").strip() == text


def test_decode_leaves_out_what_is_no_text(vocabulary):
    ids = vocabulary.encode("the torch")
    docid = vocabulary.docids.start + 3
    assert vocabulary.decode([docid, *ids, EOS, docid, PAD, PAD]) == "the torch"
    assert vocabulary.decode(np.array([*ids, EOS, PAD], np.int32)) == "the torch"
    assert vocabulary.decode([]) == ""


def test_casefold_is_a_choice(model):
    folded = Vocabulary(model, 4)
    assert folded.encode("TORCH Seam") == folded.encode("torch seam")
    cased = Vocabulary(train_text_model(TEXTS, size=120, casefold=False), 4)
    assert cased.encode("The torch") != cased.encode("the torch")
    assert cased.decode(cased.encode("The torch")) == "The torch"


def test_encode_batch(vocabulary):
    texts = ["the torch burns gas and the seam joins two sheets", "seam", ""]
    ids = [vocabulary.encode(t) for t in texts]
    length = len(ids[0]) + 3
    batch = vocabulary.encode_batch(texts, length)
    assert batch.dtype == np.int32 and batch.shape == (3, length)
    for row, expected in zip(batch, ids, strict=True):
        assert row.tolist() == [*expected, EOS] + [PAD] * (length - len(expected) - 1)


def test_encode_batch_cuts_and_keeps_eos(vocabulary):
    ids = vocabulary.encode(TEXTS[0])
    for length in range(1, len(ids) + 3):
        row = vocabulary.encode_batch([TEXTS[0]], length)[0].tolist()
        kept = ids[: length - 1]
        assert row == [*kept, EOS] + [PAD] * (length - len(kept) - 1)
        assert row.count(EOS) == 1
    exact = vocabulary.encode_batch([TEXTS[0]], len(ids) + 1)[0]
    assert exact.tolist() == [*ids, EOS], "what just fits is not cut"


def test_encode_batch_of_nothing(vocabulary):
    assert vocabulary.encode_batch([], 5).shape == (0, 5)


# --- on disk -----------------------------------------------------------------------------------


def test_saved_and_opened_again(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    assert loaded == vocabulary
    assert loaded.encode(TEXTS[1]) == vocabulary.encode(TEXTS[1])
    assert (loaded.size, loaded.docids) == (vocabulary.size, vocabulary.docids)
    assert read_text_model(tmp_path / "spiece.model") == vocabulary.model


@pytest.mark.parametrize(
    "damage", ["no folder", "no model", "no json", "half json", "no key", "a list", "bad model"]
)
def test_a_folder_without_a_whole_vocabulary(vocabulary, tmp_path, damage):
    folder = tmp_path / "v"
    if damage != "no folder":
        folder.mkdir()
        vocabulary.save(folder)
    about = folder / "vocabulary.json"
    if damage == "no model":
        (folder / "spiece.model").unlink()
    elif damage == "no json":
        about.unlink()
    elif damage == "bad model":
        (folder / "spiece.model").write_bytes(b"not a model")
    elif damage != "no folder":
        about.write_text({"half json": "{", "no key": "{}", "a list": "[]"}[damage])
    with pytest.raises(UserError, match="no vocabulary here"):
        Vocabulary.load(folder).encode("torch")


def test_the_json_says_what_stands_where(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    assert json.loads((tmp_path / "vocabulary.json").read_text()) == {
        "text_size": vocabulary.text_size,
        "docid_size": 50,
        "size": vocabulary.size,
    }


def test_a_text_model_from_elsewhere(model, tmp_path):
    (tmp_path / "ours.model").write_bytes(model)
    assert read_text_model(tmp_path / "ours.model") == model
    (tmp_path / "foreign.model").write_bytes(train_elsewhere())
    with pytest.raises(UserError, match=r"foreign.model: .*\(-1, 2, 0\).*need \(0, 1, 2\)"):
        read_text_model(tmp_path / "foreign.model")
    (tmp_path / "t5.model").write_bytes(train_elsewhere(pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    assert read_text_model(str(tmp_path / "t5.model"))


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_no_text_model_at_all(tmp_path, content):
    path = tmp_path / "x.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="x.model: not a SentencePiece model") as caught:
        read_text_model(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def t5() -> Vocabulary:
    if not T5_MODEL.is_file():
        pytest.skip(f"T5's vocabulary is not at {T5_MODEL}: put spiece.model there to test it")
    return Vocabulary(read_text_model(T5_MODEL), docid_size=1002)


def test_t5s_own_vocabulary(t5):
    """The ids that every T5 gives for this sentence."""
    text = "translate English to German: That is good."
    ids = [13959, 1566, 12, 2968, 10, 466, 19, 207, 5]
    assert t5.encode(text) == ids
    assert t5.decode(ids) == text
    assert t5.encode_batch([text], 11).tolist() == [[*ids, EOS, PAD]]
    assert t5.text_size == 32_000
    assert t5.docids == DocidSpace(start=32_000, size=1002)
    assert t5.size == 33_024  # 33,000 rounded up to a multiple of 128


# --- training ----------------------------------------------------------------------------------


def test_training_takes_at_most_the_asked_size_and_gives_a_small_corpus_less(model):
    assert Vocabulary(model, 2).text_size <= 120
    small = Vocabulary(train_text_model(TEXTS[:1]), 2)
    assert 10 < small.text_size < 100
    assert small.decode(small.encode(TEXTS[0])) == TEXTS[0].lower()


def test_training_is_deterministic(model):
    assert train_text_model(iter(TEXTS), size=120) == model


def test_a_text_longer_than_sentencepiece_reads_is_not_dropped():
    """Its end is beyond 4,192 bytes; the last words come nowhere else."""
    text = " ".join(["torch seam gas"] * 1000 + ["xylophone"] * 20)
    vocabulary = Vocabulary(train_text_model([text], size=100), 2)
    assert UNK not in vocabulary.encode("xylophone")


@pytest.mark.parametrize("text", ["焊接火炬气体钢板" * 300, "torch/seam/gas/" * 400])
def test_a_long_text_without_spaces_is_not_dropped_either(text):
    """Languages written without spaces, and long addresses."""
    vocabulary = Vocabulary(train_text_model([text], size=100), 2)
    assert UNK not in vocabulary.encode(text[:15])


@pytest.mark.parametrize(("texts", "size"), [([], 100), (["", " "], 100)])
def test_what_cannot_be_trained_is_the_users_to_mend(texts, size):
    """No text at all."""
    with pytest.raises(UserError):
        train_text_model(texts, size=size)


def test_more_characters_than_pieces_get_a_piece_each():
    """A corpus in Chinese has more different characters than a small vocabulary has pieces."""
    text = " ".join(chr(0x4E00 + i) for i in range(400))
    vocabulary = Vocabulary(train_text_model([text], size=100), 2)
    assert vocabulary.text_size > 400
    assert UNK not in vocabulary.encode(text)
