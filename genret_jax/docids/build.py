"""One door to all families of identifiers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genret_jax.docids.clusters import hierarchical_docids
from genret_jax.docids.keywords import keyword_docids
from genret_jax.docids.numeric import atomic_docids, naive_docids
from genret_jax.docids.quantisers import pq_docids, rq_docids
from genret_jax.docids.subwords import subword_docids
from genret_jax.docids.table import DocidTable, Setting
from genret_jax.docids.title import title_docids
from genret_jax.errors import UserError

if TYPE_CHECKING:
    from genret_jax.corpus import Document


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family of identifiers.

    Attributes:
      build: makes the table; its keyword arguments that are not in `inputs` are the settings.
      inputs: which of "documents", "texts", "pieces" and "seed" it takes.
      summary: one line for help texts.
      labels: what a token's label is: "words", "pieces" of the vocabulary, or "" for a mere name.
    """

    build: Callable[..., DocidTable]
    inputs: tuple[str, ...]
    summary: str
    labels: str = ""

    @property
    def settings(self) -> Mapping[str, Setting]:
        """The settings of this family and their defaults."""
        parameters = inspect.signature(self.build).parameters
        return {n: p.default for n, p in parameters.items() if n not in self.inputs}


KINDS: Mapping[str, Kind] = {
    "keywords": Kind(keyword_docids, ("texts",), "the most important words of a document", "words"),
    "subwords": Kind(
        subword_docids, ("texts", "pieces"), "as many sub-word pieces for each document", "pieces"
    ),
    "title": Kind(title_docids, ("documents", "pieces"), "the title in sub-word pieces", "pieces"),
    "atomic": Kind(atomic_docids, ("documents",), "one token a document"),
    "naive": Kind(naive_docids, ("documents", "seed"), "the digits of a document's number"),
    "hierarchical": Kind(hierarchical_docids, ("texts", "seed"), "a path of k-means clusters"),
    "pq": Kind(pq_docids, ("texts", "seed"), "product-quantisation codes"),
    "rq": Kind(rq_docids, ("texts", "seed"), "residual-quantisation codes, coarse to fine"),
}


def check_kind(kind: str) -> None:
    """UserError for a kind of docids that is not in `KINDS`."""
    if kind not in KINDS:
        raise UserError(f"unknown kind of docids {kind!r}: give one of {', '.join(KINDS)}")


def build_docids(
    kind: str,
    documents: Sequence[Document],
    *,
    pieces: Callable[[str], list[str]] | None = None,
    texts: Sequence[str] | None = None,
    seed: int = 0,
    **settings: Setting,
) -> DocidTable:
    """Makes identifiers for documents.

    The same input, settings and seed give the same table.

    Args:
      kind: a key of `KINDS`.
      documents: the corpus, in order; a row's document is a position in it.
      pieces: cuts a text into sub-word pieces; "title" needs it, the others leave it alone.
      texts: what words and vectors are taken from, one a document; title and text of the document
        where not given. A caller may append training queries, so that identifiers speak the
        language of queries.
      seed: of everything random.
      **settings: of the family, see `KINDS[kind].settings` and the function behind it.

    Raises:
      UserError: an unknown kind or setting, a value of a wrong type or out of range, no documents.

    Example:
      >>> table = build_docids("keywords", [Document("1", "Red car", "")], terms=1)
      >>> table.text(0)
      'red'
    """
    check_kind(kind)
    if not documents:
        raise UserError("there are no documents to build docids for: give a corpus that has some")
    family = KINDS[kind]
    checked = _checked_settings(kind, family, settings)
    inputs: dict[str, Any] = {"documents": documents, "seed": seed}
    if "pieces" in family.inputs:
        if pieces is None:
            raise UserError(f"docids of kind {kind!r} need a tokenizer: give pieces=...")
        inputs["pieces"] = pieces
    if "texts" in family.inputs:
        if texts is None:
            texts = [f"{document.title}\n{document.text}" for document in documents]
        if len(texts) != len(documents):
            raise UserError(
                f"{len(texts)} texts for {len(documents)} documents: give one for each document"
            )
        inputs["texts"] = texts
    return family.build(**{name: inputs[name] for name in family.inputs}, **checked)


def _checked_settings(
    kind: str, family: Kind, settings: Mapping[str, Setting]
) -> dict[str, Setting]:
    """The settings with whole numbers made floats where a float is wanted.

    Raises UserError for an unknown setting, or a value of another type than the default.
    """
    known = family.settings
    checked: dict[str, Setting] = {}
    for name, value in settings.items():
        if name not in known:
            valid = ", ".join(known) or "none"
            raise UserError(f"docids of kind {kind!r} have no setting {name!r}; valid are: {valid}")
        wanted = type(known[name])
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise UserError(
                f"{name} = {value!r} for docids of kind {kind!r}: give a value of type"
                f" {wanted.__name__}, such as the default {known[name]!r}"
            )
        checked[name] = value
    return checked
