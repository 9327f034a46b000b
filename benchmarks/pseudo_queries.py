"""What pseudo-queries are worth for documents with and without train queries.

    python -m benchmarks.pseudo_queries split wikitablequestions wtq_dev
    genret pseudo-queries wtq_dev --out pseudo.jsonl --gin 'TrainConfig.steps = 450' \\
        --gin 'TrainConfig.warmup_steps = 40' --gin 'TrainConfig.evaluations = 3'
    python -m benchmarks.pseudo_queries measure wtq_dev pseudo.jsonl --round-trip 20

`split` makes a collection of the train queries alone: all queries of a tenth of the documents that
have any are "dev_unseen", 6 % of the others are "dev", the rest is "train". `measure` searches both
with BM25 and with a retriever at its lexical start, with and without pseudo-queries.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from genret_jax.baselines.sparse import BM25
from genret_jax.corpus import Corpus, read_corpus, write_corpus
from genret_jax.evaluation import evaluate
from genret_jax.indexing import build_index
from genret_jax.negatives import bm25_search
from genret_jax.pseudo_queries import read_pseudo_queries
from genret_jax.recipe import load_recipe
from genret_jax.scoring import run_of_candidates
from genret_jax.splitting import split_corpus
from genret_jax.stages.common import DEV_BEAM, Materials
from genret_jax.training.lexical_start import lexical_start

Pairs = Sequence[tuple[str, int]]
SPLITS = ("dev", "dev_unseen")
METRICS = ("hits@1", "hits@10", "mrr@10")


def split(corpus: Corpus, *, seed: int = 7) -> Corpus:
    """The train queries as train, dev (of known documents) and dev_unseen (of unknown ones)."""
    rng = np.random.default_rng(seed)
    train = corpus.qrels["train"]
    asked = sorted({document for judged in train.values() for document in judged})
    held = set(rng.choice(asked, len(asked) // 10, replace=False))
    parts: dict[str, dict] = {"train": {}, "dev": {}, "dev_unseen": {}}
    for query, judged in train.items():
        if set(judged) & held:
            parts["dev_unseen"][query] = judged
        else:
            parts["dev" if rng.random() < 0.06 else "train"][query] = judged
    queries = {query: corpus.queries[query] for query in corpus.queries if query in train}
    return Corpus(corpus.documents, queries, parts, name=f"{corpus.name}-dev")


def measure_bm25(name: str, corpus: Corpus, pairs: Pairs) -> None:
    """BM25 over the documents with these queries appended to them."""
    extra: dict[int, list[str]] = collections.defaultdict(list)
    for query, position in pairs:
        extra[position].append(query)
    index = BM25.index(corpus.documents, extra_texts=extra)
    for part in SPLITS:
        queries = corpus.split_queries(part)
        found = zip(queries, index.search(list(queries.values()), k=100), strict=True)
        run = {query: {hit.document: hit.score for hit in hits} for query, hits in found}
        show(name, part, evaluate(run, corpus.qrels[part], METRICS))


def measure_start(name: str, corpus: Corpus, materials: Materials) -> None:
    """Generation by parameters of the lexical start."""
    model = materials.model
    params = lexical_start(
        jax.device_get(model.init(jax.random.key(0))[0]),
        examples=materials.examples,
        config=model.config,
        docids=model.docids,
        seed=0,
    )
    ranker, on_device = materials.ranker(), jax.device_put(params)
    for part in SPLITS:
        queries = corpus.split_queries(part)
        candidates = ranker.candidates(on_device, list(queries.values()), beam=DEV_BEAM)
        found = dict(zip(queries, candidates, strict=True))
        run = run_of_candidates(found, ranker.fusion, materials.document_ids, scoring="generation")
        show(name, part, evaluate(run, corpus.qrels[part], METRICS))


def show(name: str, part: str, values: Mapping[str, float]) -> None:
    numbers = "  ".join(f"{metric} {value:.3f}" for metric, value in values.items())
    print(f"{name:<32} {part:<11} {numbers}", flush=True)


def measure(corpus: Corpus, pseudo: Pairs, *, round_trip: int) -> None:
    """Prints a line for every way to search and split."""
    search, asked = bm25_search(corpus.documents), {p for _, p in corpus.pairs("train")}
    found = search([query for query, _ in pseudo], round_trip)
    kept = [pair for pair, hits in zip(pseudo, found, strict=True) if pair[1] in hits]
    sets: dict[str, Pairs] = {
        "": [],
        f"+ {len(pseudo)} pseudo": pseudo,
        f"+ {len(kept)} round trip": kept,
    }
    train = corpus.pairs("train")
    for name, pairs in sets.items():
        measure_bm25(f"bm25 {name}", corpus, pairs)
        measure_bm25(f"bm25+q {name}", corpus, [*train, *pairs])
    alone = [pair for pair in pseudo if pair[1] not in asked]
    sets[f"+ {len(alone)} of the unasked"] = alone
    recipe = load_recipe("dsi")
    parts = split_corpus(corpus, recipe.data, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(
            corpus,
            Path(folder) / "index",
            docids=recipe.docids,
            vocabulary=recipe.vocabulary,
            pairs=parts.pairs,
        )
        for name, pairs in sets.items():
            given = dataclasses.replace(parts, pseudo=pairs)
            materials = Materials(corpus.documents, given, index, recipe)
            measure_start(f"lexical start {name}", corpus, materials)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("split")
    verb.add_argument("corpus")
    verb.add_argument("out")
    verb = verbs.add_parser("measure")
    verb.add_argument("corpus")
    verb.add_argument("pseudo_queries")
    verb.add_argument("--round-trip", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.verb == "split":
        write_corpus(split(read_corpus(arguments.corpus, splits=["train"])), arguments.out)
        return
    corpus = read_corpus(arguments.corpus)
    pseudo = read_pseudo_queries(arguments.pseudo_queries, corpus)
    measure(corpus, pseudo, round_trip=arguments.round_trip)


if __name__ == "__main__":
    main()
