"""NQ320k from a miniature of the raw files: each trap of the protocol by itself, and the whole."""

from __future__ import annotations

import gzip
import json

import pytest

from genret_jax.corpus import read_corpus
from genret_jax.errors import UserError
from tasks import nq320k
from tasks.nq320k import PUBLISHED, BertTitles, Texts, build, read_rows
from tasks.writing import differences


def html(title: str, *, abstract: str = "about it", body: str = "", tail: str = "") -> str:
    """A document as tokens with spaces between them, as the raw files have it."""
    heading = f"<H1> {title} </H1> " if title else ""
    lead = f"<P> {abstract} </P> " if abstract else ""
    return f"{heading}<Table> x </Table> {lead}{body}{tail}"


LISTS = "<Ul> <Li> one </Li> </Ul> <P> middle </P> <Ul> <Li> two </Li> </Ul> after"


def train_row(number: int, question: str, text: str) -> dict:
    return {"example_id": number, "question_text": question, "document_text": text}


def dev_row(number: int, question: str, title: str, text: str) -> dict:
    tokens = [{"token": token, "html_token": token[0] == "<"} for token in text.split(" ")]
    return {
        "example_id": number,
        "question_text": question,
        "document_title": title,
        "document_tokens": tokens,
        "document_html": "<html>not read</html>",
    }


def write(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def plain(titles):
    """A normaliser without BERT: blanks and case aside."""
    return [" ".join(title.lower().split()) for title in titles]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A WordPiece vocabulary: a few words, and all letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokens += [f"##{letter}" for letter in letters] + list(".,!?'()-&:/\"")
    tokens += ["kite", "lake", "##side", "mill"]
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n")
    return path


@pytest.mark.parametrize(
    ("text", "abstract", "content"),
    [
        (html("K", body=LISTS), " about it ", "one"),  # up to the last but one </Ul>
        (html("K", body="b <Ul> <Li> one </Li> </Ul> after"), " about it ", "b one"),
        (html("K", body="b <B> c </B> d"), " about it ", "b c d"),  # no list: to the end
        (html("K", body="b \n c <Br>\n d"), " about it ", "b c d"),
        (html("K", abstract="a <B> b </B>", body="c"), " a <B> b </B> ", "c"),  # its tags stay
        ("<Ul> a </Ul> <Ul> b </Ul> <P> p </P> c", " p ", ""),  # lists before the abstract
        ("x </P> y <P> z </P> c", "", "y z c"),  # the first </P> ends an abstract not yet begun
    ],
)
def test_abstract_and_content(text, abstract, content):
    assert Texts()(text) == (abstract, content)


def test_without_an_abstract_the_content_begins_where_that_of_the_row_before_did():
    texts = Texts()
    assert texts("12345 none") == ("", "12345 none")
    assert texts("<P> ab </P> cd") == (" ab ", "cd")
    assert texts("0123456789abcdef") == ("", "bcdef")
    assert texts.counts == {"without_p": 2, "without_ul": 3, "one_ul": 0}


def test_titles_of_train_are_headings_and_those_of_dev_a_field(tmp_path):
    text = html("From the heading", body="c")
    train = write(tmp_path / "train.jsonl.gz", [train_row(1, "q", text), train_row(2, "r", "no")])
    dev = write(tmp_path / "dev.jsonl", [dev_row(3, "s", "From the field", text)])
    first, second = read_rows(train, train=True, texts=Texts())
    assert (first.title, second.title) == (" From the heading ", "")
    assert first.text == " From the heading  about it c", "nothing between the parts"
    (third,) = read_rows(dev, train=False, texts=Texts())
    assert (third.title, third.text) == ("From the field", "From the field about it c")
    assert (third.id, third.question) == ("3", "s")


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        (" Kite ", "kite"),
        ("LAKESIDE", "lakeside"),  # two pieces, one word
        ("Lake-Side", "lake - side"),  # punctuation stands alone, and stays so
        ("Mill, the kite!", "mill, the kite!"),
        ("Mill's", "mill's"),  # ' s -> 's
        ("Café Été", "cafe ete"),  # accents
        ("kite\u00a0\tlake", "kite lake"),
        ("ki\u200bte", "kite"),  # control characters
        ("Straße", "[UNK]"),  # ß is lower case already, and no piece here
        ("", ""),
        ("[UNK]", "[UNK] unk [UNK]"),  # brackets are no pieces of this vocabulary
    ],
)
def test_titles_as_bert_writes_them(title, expected, vocabulary):
    assert BertTitles(vocabulary)([title, "kite"]) == [expected, "kite"]


def test_a_vocabulary_of_something_else_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"\[UNK\] is missing"):
        BertTitles(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("[UNK]\na\na\n")
    with pytest.raises(UserError, match="no WordPiece vocabulary"):
        BertTitles(tmp_path / "vocab.txt")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Train and dev files with every trap in them."""
    place = tmp_path_factory.mktemp("raw")
    train = [
        train_row(11, "who flies it", html("Kite", body=f"first text {LISTS}")),
        train_row(12, "what floats", html("Lakeside", body="shore <Ul> x </Ul> y")),
        train_row(13, "again", html("KITE", body="second text of the same title")),
        train_row(14, "untitled", html("", body="p")),
        train_row(15, "untitled too", html("", abstract="", body="q")),
    ]
    dev = [
        dev_row(21, "seen", "Kite", html("Other heading", body="dev text")),
        dev_row(22, "unseen", "Mill", html("Kite", body="its heading is a train title")),
        dev_row(23, "unseen again", "mill", html("Mill", body="later")),
        dev_row(24, "no title", "", html("Lakeside", body="r")),
    ]
    return write(place / "train.jsonl.gz", train), write(place / "dev.jsonl", dev)


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory, vocabulary):
    out = tmp_path_factory.mktemp("built") / "nq"
    return out, build(*raw, out, normalise=BertTitles(vocabulary))


def test_documents_are_the_titles_in_order_of_train_then_dev(built):
    out, report = built
    corpus = read_corpus(out)
    titles = [(d.id, d.title) for d in corpus.documents]
    assert titles == [("0", "kite"), ("1", "lakeside"), ("2", ""), ("3", "mill")]
    texts = [d.text for d in corpus.documents]
    assert texts[0] == " Kite  about it first text one", "the first row of a title has its text"
    assert texts[1] == " Lakeside  about it shore x"
    assert texts[2] == " about it p", "rows without title are one document"
    assert texts[3] == "Mill about it its heading is a train title"
    assert report["documents"] == 4 and report["documents_of_train"] == 3
    assert report["without_title"] == 3
    assert report["rows"]["train"] == {"without_p": 1, "without_ul": 3, "one_ul": 1}


def test_every_question_has_the_document_of_its_title(built):
    corpus = read_corpus(built[0])
    assert list(corpus.queries) == ["11", "12", "13", "14", "15", "21", "22", "23", "24"]
    assert corpus.qrels["train"] == {
        q: {d: 1} for q, d in zip(["11", "12", "13", "14", "15"], "01022", strict=True)
    }
    assert corpus.qrels["test"] == {"21": {"0": 1}, "22": {"3": 1}, "23": {"3": 1}, "24": {"2": 1}}


def test_seen_are_test_questions_about_documents_of_train_questions(built):
    corpus, report = read_corpus(built[0]), built[1]
    gold = {d for judged in corpus.qrels["train"].values() for d in judged}
    for query, judged in corpus.qrels["test"].items():
        split = "test_seen" if gold & set(judged) else "test_unseen"
        assert corpus.qrels[split][query] == judged
    assert (report["test_seen"], report["test_unseen"], report["test_questions"]) == (2, 2, 4)
    assert report["train_questions"] == 5


def test_the_order_of_the_files_decides(raw, tmp_path):
    """Dev first gives other texts: what concatenating the other way round would do."""
    train, dev = raw
    rows = read(train)
    turned = write(tmp_path / "turned.jsonl", rows[::-1])
    build(turned, dev, tmp_path / "out", normalise=plain)
    documents = read_corpus(tmp_path / "out").documents
    assert documents[1].title == "kite" and "second text" in documents[1].text


def test_equal_input_gives_equal_digests(raw, built, tmp_path, vocabulary):
    again = build(*raw, tmp_path / "again", normalise=BertTitles(vocabulary))
    assert again == built[1]
    assert json.loads((tmp_path / "again" / nq320k.REPORT).read_text()) == again
    assert set(again["sha256"]) == {
        "corpus.jsonl",
        "queries.jsonl",
        *(f"qrels/{s}.tsv" for s in nq320k._SPLITS),
    }
    build(*raw, tmp_path / "again", normalise=plain)  # replaces its own
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="was not made by this program"):
        build(*raw, tmp_path / "mine", normalise=plain)


def test_what_differs_from_the_published_counts_is_said(built):
    lines = differences(built[1], PUBLISHED)
    assert "documents: 4, published are 109,739" in lines and len(lines) == 5
    assert differences(PUBLISHED, PUBLISHED) == []
    assert PUBLISHED["test_seen"] + PUBLISHED["test_unseen"] == 7_830


def test_the_program(raw, tmp_path, vocabulary, monkeypatch, capsys):
    command = ["nq320k", "--train", str(raw[0]), "--dev", str(raw[1])]
    command += ["--bert-vocab", str(vocabulary), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    nq320k.run(nq320k.main)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["documents"] == 4
    assert "documents: 4, published are 109,739" in printed.err
    monkeypatch.setattr("sys.argv", [*command, "--expect", "published"])
    with pytest.raises(SystemExit) as stop:
        nq320k.run(nq320k.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("nq320k: ")
    assert (tmp_path / "out" / "corpus.jsonl").is_file(), "what was made stays to be looked at"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"example_id": 1, "document_text": "<P> a </P>"}, "no field 'question_text'"),
        (train_row(1, "q", "<P> never ends"), "no row of Natural Questions"),
        ([], "no row of Natural Questions"),
    ],
)
def test_broken_rows_are_named_by_their_line(row, message, tmp_path):
    path = write(tmp_path / "train.jsonl", [train_row(0, "q", html("a")), row])
    with pytest.raises(UserError, match=rf"train.jsonl:2: {message}"):
        list(read_rows(path, train=True, texts=Texts()))


def test_an_example_that_comes_twice_is_a_mistake(raw, tmp_path):
    rows = read(raw[0])
    twice = write(tmp_path / "twice.jsonl", [*rows, rows[0]])
    with pytest.raises(UserError, match="example 11 is there twice"):
        build(twice, raw[1], tmp_path / "out", normalise=plain)
