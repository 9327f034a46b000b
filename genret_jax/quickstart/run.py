"""`genret quickstart`: the embedded collection, start to finish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genret_jax.comparison.searchers import compare_searchers
from genret_jax.errors import UserError
from genret_jax.fit import fit
from genret_jax.harness.measuring import baseline
from genret_jax.quickstart import standard_library_corpus
from genret_jax.recipe import load_recipe

MINUTES = 2.5
_BASELINES = ("bm25", "bm25+q")
QUESTIONS = (
    "how do I merge several sorted lists without loading them all into memory?",
    "count how often each word occurs in a text",
    "run another program and read what it printed",
)


def run_quickstart(out: Path, *, started: float) -> tuple[dict[str, Any], str]:
    """Trains, measures against BM25, and answers three questions.

    Args:
      out: folder of the run; one that is fitted already is searched as it is.
      started: `time.monotonic()` when the time budget began.

    Returns:
      The numbers for JSON, and the text for a person.
    """
    corpus = standard_library_corpus()
    retriever = fit(
        corpus, recipe=load_recipe("quickstart"), out=out, minutes=MINUTES, started=started
    )
    searchers: dict[str, Any] = {"genret": retriever}
    searchers |= {name: baseline(name, corpus) for name in _BASELINES}
    comparison = compare_searchers(searchers, corpus, split="test")
    picture = comparison.write(out)[-1]
    answers = {question: retriever.search(question, k=3) for question in QUESTIONS}
    if not any(answers.values()):
        raise UserError(f"{out}: the retriever answers nothing; delete the folder and try again")
    lines = [
        f"{len(corpus.documents)} documents of Python's standard library, "
        f"{len(corpus.split_queries('test'))} test questions:",
        "",
        comparison.table(),
        "",
        f"pictures: {out / 'curves.png'}, {picture}",
    ]
    for question, hits in answers.items():
        lines += ["", question]
        lines += [f"  {hit.rank}. {hit.title:<36} log p {hit.score:7.2f}" for hit in hits]
    lines += ["", f'Ask more: genret search {out} "your question"']
    value = {
        **comparison.to_dict(),
        "answers": {q: [hit.document for hit in hits] for q, hits in answers.items()},
    }
    return value, "\n".join(lines)
