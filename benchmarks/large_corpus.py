"""How much memory and time `genret compare` takes of a large corpus, method by method.

    python -m benchmarks.large_corpus --out large
    python -m benchmarks.large_corpus --out large --documents 1e6 --methods bm25,dsi-rq --steps 10

The corpus is made: words are drawn by Zipf's law, each document has words of its own besides, and a
query is a few words of its document. So its quality means nothing; its sizes are those of a
collection of passages. One `genret compare` does all methods, one after the other, in a process of
its own. A method's peak is the kernel's count of resident memory while it was trained and searched
(from /proc, so on Linux); what methods before it have left behind is in it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from genret_jax.corpus import Corpus, Document, write_corpus

METHODS = (
    "bm25,bm25+q,tfidf,tfidf+q,dsi,dsi-naive,dsi-hierarchical,dsi-pq,dsi-rq,nci,genre,ngram,minder,"
    "ltrgr,dogr,dense,glen,rrf:bm25+q:dogr"
)
_WORDS = 50_000
_OWN = 8  # words of a document that no other is likely to have so many of


def made_corpus(
    documents: int, *, words: int = 60, train: int = 50_000, test: int = 200, seed: int = 0
) -> Corpus:
    """A corpus of drawn words.

    Args:
      documents: how many.
      words: of a document's text, on average, besides twelve of its own.
      train: queries with judgements in "train", each of a document drawn at random.
      test: as many in "test", and in "dev".
    """
    rng = np.random.default_rng(seed)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u", "an", "er")]
    parts = [[syllables[k] for k in row] for row in rng.integers(0, len(syllables), (_WORDS, 4))]
    sizes = rng.integers(2, 5, _WORDS)
    vocabulary = np.array(
        ["".join(row[:size]) for row, size in zip(parts, sizes, strict=True)], dtype=object
    )
    odds = 1 / np.arange(1, _WORDS + 1)
    common = np.cumsum(odds / odds.sum())
    lengths = rng.integers(words // 2, words + words // 2, documents)
    drawn = np.minimum(np.searchsorted(common, rng.random(lengths.sum())), _WORDS - 1)
    own = rng.integers(100, _WORDS, (documents, _OWN))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    found = []
    for i in range(documents):
        text = np.concatenate([drawn[starts[i] : starts[i + 1]], own[i], own[i, :4]])
        rng.shuffle(text)
        title, text = vocabulary[own[i, :3]], vocabulary[text]
        found.append(Document(f"d{i}", " ".join(title), " ".join(text)))
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, dict[str, int]]] = {}
    for split, count in (("train", train), ("dev", test), ("test", test)):
        qrels[split] = {}
        for number, i in enumerate(rng.integers(0, documents, count)):
            name = f"{split}{number}"
            asked = own[i, rng.permutation(_OWN)[: rng.integers(2, 5)]]
            queries[name] = " ".join(vocabulary[asked])
            qrels[split][name] = {f"d{i}": 1}
    return Corpus(tuple(found), queries, qrels, name=f"made-{documents}")


class Watch:
    """Reads the kernel's count of a process's peak resident memory, for one phase after another.

    Attributes:
      peaks: name of the phase -> bytes.
    """

    def __init__(self, process: int):
        self._folder = Path(f"/proc/{process}")
        self._phase, self.peaks = "start", {"start": 0}
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """Begins another: the count starts anew from what is resident."""
        with self._lock:
            self._read()
            (self._folder / "clear_refs").write_text("5")
            self.peaks.setdefault(name, 0)
            self._phase = name

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        """The last count before the process ends is lost: so it is read all the time."""
        while not self._ended.wait(0.5):
            with self._lock:
                self._read()

    def _read(self) -> None:
        try:
            status = (self._folder / "status").read_text()
        except OSError:  # it has ended
            return
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        if found:
            peak = int(found[1]) * 1024
            self.peaks[self._phase] = max(self.peaks[self._phase], peak)


def compare(corpus: Path, out: Path, options: list[str]) -> dict[str, int]:
    """Runs `genret compare`, and goes on with it.

    Returns:
      Method -> the peak in bytes while it was trained and searched, in this call or an earlier one:
      `out`/peaks.json keeps them.
    """
    command = [sys.executable, "-m", "genret_jax", "compare", str(corpus), f"--out={out}", *options]
    file = out / "peaks.json"
    kept: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}

    def peaks() -> dict[str, int]:
        """With those of earlier calls: a training that goes on has had its largest there, maybe."""
        found = kept | {n: max(p, kept.get(n, 0)) for n, p in watch.peaks.items()}
        if out.is_dir():
            file.write_text(json.dumps(found))
        return found

    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        watch = Watch(child.pid)
        assert child.stderr is not None
        for line in child.stderr:
            sys.stderr.write(line)
            # [3/9] dsi, seed 0: 1 training left
            begun = re.search(r"\[\d+/\d+\] (.+?)(?:, seed \d+)?: (?!.*is there)", line)
            if begun and " failed: " not in line:
                watch.phase(begun[1])
                peaks()
        watch.end()
        found = peaks()
    if child.returncode not in (0, 1):  # 1: a method failed, and is told of
        sys.exit(f"genret compare ended with {child.returncode}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="of the corpus and the comparison")
    parser.add_argument("--documents", type=lambda text: int(float(text)), default=100_000)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--queries", type=int, default=50, help="searched of dev and test")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING")
    arguments = parser.parse_args()
    corpus = arguments.out / f"made-{arguments.documents}"
    if not corpus.exists():
        write_corpus(made_corpus(arguments.documents), corpus)
    began = time.monotonic()
    options = ["--methods", arguments.methods, "--steps", str(arguments.steps)]
    options += ["--queries", str(arguments.queries)]
    options += ["--gin", f"DataConfig.dev_queries = {arguments.queries}"]
    for binding in arguments.gin:
        options += ["--gin", binding]
    out = arguments.out / f"comparison-{arguments.documents}"
    peaks = compare(corpus, out, options)
    rows = json.loads((out / "comparison.json").read_text())["splits"]["test"]["rows"]
    print("| method | minutes | index, MB | queries/s | p50 ms | peak, GB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        costs = row["costs"]
        cells = ["failed", "", "", ""]
        if costs:
            cells = [f"{costs['minutes']:.1f}", f"{costs['index_bytes'] / 1e6:.1f}"]
            cells += [f"{costs['queries_per_second']:.0f}", f"{costs['p50_ms']:.1f}"]
        peak = f"{peaks[name] / 1e9:.1f}" if name in peaks else ""
        print(f"| {' | '.join([name, *cells, peak])} |")
    minutes = (time.monotonic() - began) / 60
    most = max(peaks.get(name, 0) for name in rows)
    print(f"\n{most / 1e9:.1f} GB at the peak of all; this call took {minutes:.0f} minutes.")


if __name__ == "__main__":
    main()
