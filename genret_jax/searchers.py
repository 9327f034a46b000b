"""One door to everything that is fitted and searched, whether it writes docids or not.

A recipe whose SearcherConfig names a module is made and opened by that module's two functions:

    fit(corpus: Corpus, folder: Path, work: Work) -> dict    writes what search reads into a folder
                                                             that is there; gives what is to be said
    load(folder: Path) -> Searcher                           opens it

A module whose searcher is the same whatever the seed says TRAINED = False. One whose searcher is
no dual encoder says GROUP: "lexical", "dense" or "generative", where a comparison puts it. One that
learns from pseudo-queries, which then are in `work.split`, says PSEUDO_QUERIES = True.
`fit` may give "dev" (dev metrics) and "training" (such as steps), and whatever else belongs into
retriever.json. So a new method is a gin file and, where no module here makes it, a module.

RUN/
  run.json     whose run it is
  retriever/   what the module wrote, retriever.json, the documents
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, overload

from genret_jax.baselines.protocol import Hit, Searcher
from genret_jax.corpus import Corpus
from genret_jax.documents import DocumentStore, write_documents
from genret_jax.errors import UserError
from genret_jax.files import replace_on_success
from genret_jax.indexing import FORMAT, documents_digest, read_json
from genret_jax.pseudo_queries import read_pseudo_queries
from genret_jax.recipe import Recipe
from genret_jax.retriever import Retriever, find_retriever
from genret_jax.splitting import Split, split_corpus
from genret_jax.training import processes
from genret_jax.training.budget import Clock, check_minutes
from genret_jax.training.claims import claimed

_RESERVE_SECONDS = 5.0  # for writing the folder


@dataclasses.dataclass(frozen=True)
class Work:
    """What a module's `fit` is given besides the corpus.

    Attributes:
      recipe: of the run.
      run: its folder, for checkpoints.
      clock: the time budget.
      corpus: once more, for the split.
      pseudo: (query, position of its document) of pseudo-queries.
    """

    recipe: Recipe
    run: Path
    clock: Clock
    corpus: Corpus
    pseudo: Sequence[tuple[str, int]] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.recipe.searcher.settings

    @functools.cached_property
    def split(self) -> Split:
        """Train pairs and dev queries, as every trained method has them, and pseudo-queries."""
        split = split_corpus(self.corpus, self.recipe.data, seed=self.recipe.train.seed)
        return dataclasses.replace(split, pseudo=self.pseudo)


@dataclasses.dataclass(frozen=True)
class FittedSearcher:
    """A searcher that a module opened, with its documents.

    Attributes:
      searcher: what searches.
      documents: by position.
      about: what retriever.json says.
      folder: of all this.
    """

    searcher: Searcher
    documents: DocumentStore
    about: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return str(self.about["method"])

    @property
    def documents_digest(self) -> str:
        return str(self.about["corpus"]["digest"])

    @overload
    def search(self, queries: str, *, k: int = ...) -> list[Hit]: ...  # type: ignore[overload-overlap]
    @overload
    def search(self, queries: Sequence[str], *, k: int = ...) -> list[list[Hit]]: ...

    def search(self, queries: Any, *, k: int = 10) -> Any:
        """At most `k` hits, best first: a list for one query, a list of lists for several."""
        if isinstance(queries, str):
            if not queries.strip():
                raise UserError("the query is empty; write some words")
            return self.searcher.search([queries], k=k)[0]
        return self.searcher.search(queries, k=k)

    def title(self, hit: Hit) -> str:
        return self.documents.find(hit.document).title


Opened: TypeAlias = Retriever | FittedSearcher


def fit_method(
    corpus: str | Path | Corpus,
    *,
    recipe: Recipe,
    out: str | Path,
    minutes: float | None = None,
    started: float | None = None,
    stage: int | None = None,
    pseudo_queries: str | Path | None = None,
    **training: Any,
) -> Opened:
    """Fits any method, or goes on where an interrupted run stopped; see `genret_jax.fit.fit`.

    Args:
      corpus, recipe, out, minutes, started, stage, pseudo_queries: of that.
      **training: what else it takes; for generative retrievers alone.

    Raises:
      UserError: for a mistake in the corpus or the recipe, or a folder of another run.
      Interrupted: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    from genret_jax.fit import fit, read_given  # brings SeqIO

    if not recipe.searcher.module:
        return fit(
            corpus,
            recipe=recipe,
            out=out,
            minutes=minutes,
            started=started,
            stage=stage,
            pseudo_queries=pseudo_queries,
            **training,
        )
    check_minutes(minutes)
    if not takes_pseudo_queries(recipe):
        training["pseudo_queries"] = pseudo_queries
    for name in (name for name, value in training.items() if value):
        option = f"--{name.replace('_', '-')}"
        raise UserError(f"method {recipe.method} takes no {option}; leave it out")
    if processes.count() > 1:
        raise UserError(
            f"method {recipe.method} is fitted by one process, and {processes.count()} have "
            "joined; start it once"
        )
    if stage is not None:
        raise UserError(f"method {recipe.method} is not trained stage by stage; leave --stage out")
    module = _module(recipe.searcher.module)
    out = Path(out)
    clock = Clock(minutes * 60 if minutes else None, started=started, reserve=_RESERVE_SECONDS)
    path, read = read_given(corpus)
    digest = documents_digest(read.documents)
    pseudo = read_pseudo_queries(pseudo_queries, read) if pseudo_queries else []
    with claimed(out, recipe, _identity(recipe, read, digest, pseudo)):
        if not (out / "retriever" / "retriever.json").is_file():
            with replace_on_success(out / "retriever") as folder:
                folder.mkdir()
                work = Work(recipe, out, clock, read, pseudo)
                found = _called(module.fit, recipe, read, folder, work)
                write_documents(read.documents, folder)
                count = len(read.documents)
                about = {"name": read.name, "path": path, "documents": count, "digest": digest}
                _write_about(folder, recipe, about, found, clock)
    return open_searcher(out)


def _write_about(
    folder: Path, recipe: Recipe, corpus: dict[str, Any], found: dict[str, Any], clock: Clock
) -> None:
    """What is said of the run, beside what the module wrote."""
    about = {
        "format": FORMAT,
        "method": recipe.method,
        "searcher": recipe.searcher.module,
        "corpus": corpus,
        "dev": {},
        "recipe": recipe.to_dict(),
        **found,
    }
    training = {"steps": 0, **found.get("training", {})}
    about["training"] = {**training, "seconds": round(clock.elapsed, 1)}
    (folder / "retriever.json").write_text(json.dumps(about, indent=1))
    (folder / "metrics.json").write_text(json.dumps({"dev": about["dev"]}, indent=1))


def open_searcher(folder: str | Path) -> Opened:
    """Opens what `fit_method` made: the run's folder, or the retriever's own.

    Raises:
      UserError: when there is none, or an unfinished or foreign one.
    """
    folder = find_retriever(Path(folder))
    about = read_json(folder / "retriever.json", what="retriever")
    if not about.get("searcher"):
        return Retriever.load(folder)
    searcher = _module(about["searcher"]).load(folder)
    return FittedSearcher(searcher, DocumentStore(folder), about, folder)


def is_trained(recipe: Recipe) -> bool:
    """Whether a method's result depends on seed and time, so that it is worth another seed."""
    return not recipe.searcher.module or getattr(_module(recipe.searcher.module), "TRAINED", True)


def takes_pseudo_queries(recipe: Recipe) -> bool:
    """Whether a method may learn from pseudo-queries, too."""
    name = recipe.searcher.module
    return not name or getattr(_module(name), "PSEUDO_QUERIES", False)


def group(recipe: Recipe) -> str:
    """Where a comparison puts a method: "lexical", "dense" or "generative"."""
    if not recipe.searcher.module:
        return "generative"
    default = "dense" if is_trained(recipe) else "lexical"
    return str(getattr(_module(recipe.searcher.module), "GROUP", default))


def _module(name: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"SearcherConfig.module {name!r} cannot be imported ({error}); give a module that is "
            "on Python's path"
        ) from None
    missing = [f for f in ("fit", "load") if not callable(getattr(module, f, None))]
    if missing:
        raise UserError(
            f"SearcherConfig.module {name!r} has no function {missing[0]}; see "
            "genret_jax/searchers.py"
        )
    return module


def _called(function: Any, recipe: Recipe, *arguments: Any) -> dict[str, Any]:
    """What a module's `fit` gives; settings that it does not know are the user's mistake."""
    try:
        return dict(function(*arguments))
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(
            f"SearcherConfig.settings of method {recipe.method}: {error}; leave it out"
        ) from None


def _identity(
    recipe: Recipe, corpus: Corpus, digest: str, pseudo: Sequence[tuple[str, int]]
) -> str:
    judged = {split: corpus.qrels.get(split, {}) for split in ("train", "dev")}
    content: list[Any] = [recipe.to_dict(), digest, corpus.queries, judged]
    content += [list(pseudo)] if pseudo else []
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
