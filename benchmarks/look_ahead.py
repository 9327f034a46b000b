"""What look-ahead finds at small beams, and what it costs.

    python -m benchmarks.look_ahead runs/onet onet_titles
    python -m benchmarks.look_ahead runs/onet onet_titles --scoring generation --beams 1,2,5,10,100

The beam returns as many documents as it has places (k = beam), so that hits@10 of a beam of 2 says
how often the document is among those two. Weights are multiples of the similarity's weight in the
retriever's fused score, and are printed in nats a unit of similarity, as `--look-ahead` takes them.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from genret_jax import Retriever
from genret_jax.corpus import Corpus, read_corpus
from genret_jax.evaluation import evaluate

METRICS = ("hits@1", "hits@10", "mrr@10")


def measure(
    retriever: Retriever, corpus: Corpus, split: str, *, beam: int, weight: float, scoring: str
) -> dict[str, Any]:
    """One row: metrics of a split, and milliseconds a query of batched search."""
    qrels = corpus.qrels[split]
    texts = [corpus.queries[query] for query in qrels]
    options: dict[str, Any] = {"beam": beam, "k": beam, "scoring": scoring, "look_ahead": weight}
    retriever.search(texts[:64], **options)  # compiles
    began = time.perf_counter()
    found = retriever.search(texts, **options)
    seconds = time.perf_counter() - began
    run = {
        query: {hit.document: hit.score for hit in hits}
        for query, hits in zip(qrels, found, strict=True)
    }
    values = {name: round(value, 4) for name, value in evaluate(run, qrels, METRICS).items()}
    return {
        "beam": beam,
        "look_ahead": round(weight, 3),
        **values,
        "ms_a_query": round(1e3 * seconds / len(texts), 2),
    }


def main() -> None:
    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a fit with a second stage, or its retriever")
    parser.add_argument("corpus")
    parser.add_argument("--split", default="test")
    parser.add_argument("--beams", type=numbers, default=[1, 2, 5, 10])
    parser.add_argument(
        "--multiples", type=numbers, default=[0, 0.25, 0.5, 1, 2], help="of the fused weight"
    )
    parser.add_argument("--scoring", choices=("fused", "generation", "semantic"), default="fused")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    retriever, corpus = Retriever.load(arguments.run), read_corpus(arguments.corpus)
    if arguments.split not in corpus.qrels:
        parser.error(f"no split {arguments.split!r}; there are {', '.join(corpus.qrels)}")
    # Where the similarity does not count in the fused score, nats themselves.
    unit = retriever.ranker.fusion.weight or 1.0
    rows = []
    for beam in arguments.beams:
        for multiple in arguments.multiples:
            rows.append(
                measure(
                    retriever,
                    corpus,
                    arguments.split,
                    beam=int(beam),
                    weight=multiple * unit,
                    scoring=arguments.scoring,
                )
            )
            if not arguments.json:
                if len(rows) == 1:
                    print(f"| {' | '.join(rows[0])} |\n|{'---:|' * len(rows[0])}")
                print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    if arguments.json:
        print(json.dumps({"unit": unit, "scoring": arguments.scoring, "rows": rows}))


if __name__ == "__main__":
    main()
