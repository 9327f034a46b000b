"""The rows of an ablation: what each leaves out of DOGR, or does otherwise."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from genret_jax.docids.build import KINDS
from genret_jax.errors import UserError
from genret_jax.harness.rows import Entry
from genret_jax.recipe import Recipe, gin_folder

log = logging.getLogger(__name__)
FULL = "dogr"
SEVERAL_TOKENS = gin_folder() / "several_tokens.gin"
DOCIDS = ("keywords", "title", "hierarchical", "rq")
# Kinds whose docids share prefixes, those first of whose prefixes most is expected.
_PREFIXES = ("hierarchical", "rq", "pq", "keywords", "subwords", "title", "naive")


@dataclasses.dataclass(frozen=True)
class Variant(Entry):
    """One row; its group is "baseline", "method", "loss", "views", "scoring" or "docids".

    Attributes:
      bindings: lines of gin that make the difference.
      usual: gin files that go with it, over which the user's stand.
      stage: where its training ends.
      begins: the variant whose stage 1 it begins with; "" for the full method's.
      of: the variant whose training it measures, where that is another one.
      beside: the variant that it differs from in one thing, where that is not the full method.
      scoring: what it is ranked by; the retriever's own choice by default.
    """

    bindings: tuple[str, ...] = ()
    usual: tuple[Path, ...] = ()
    stage: int = 2
    begins: str = ""
    of: str = ""
    beside: str = ""
    scoring: str | None = None

    @property
    def training(self) -> str:
        """The slug of the variant whose training it measures."""
        return self.of or self.slug


BASELINES = (
    Variant("bm25", "BM25 over the documents", "baseline"),
    Variant("bm25+q", "BM25 over the documents and their train queries", "baseline"),
)
# Those of one training stand together: its retriever is opened, and its search compiled, once.
VARIANTS = (
    Variant(FULL, "the whole method, ranked by the fused score", "method"),
    Variant(
        "generation only",
        "dogr's parameters, ranked by log p(docid | query)",
        "scoring",
        of=FULL,
        scoring="generation",
    ),
    Variant(
        "semantic only",
        "dogr's parameters, the beam's documents ranked by similarity",
        "scoring",
        of=FULL,
        scoring="semantic",
    ),
    Variant("stage 1 only", "its stage 1 alone, and so less time", "loss", stage=1),
    Variant(
        "stage 1 all the time",
        "stage 1 with the time of both",
        "loss",
        bindings=("ContrastiveConfig.share = 0.0",),
        stage=1,
    ),
    Variant(
        "without prefix loss",
        "stage 2 without documents that share a docid prefix",
        "loss",
        bindings=("ContrastiveConfig.prefix = 0.0",),
    ),
    Variant(
        "without retrieval loss",
        "stage 2 without retrieved and in-batch documents",
        "loss",
        bindings=("ContrastiveConfig.retrieval = 0.0",),
    ),
    Variant(
        "one view",
        "a document has one vector, of its beginning",
        "views",
        bindings=("ContrastiveConfig.pieces = 1", "ContrastiveConfig.queries = 0"),
    ),
    Variant(
        "no query views",
        "a document's vectors are of pieces of its text alone",
        "views",
        bindings=("ContrastiveConfig.queries = 0",),
    ),
)


def chosen_variants(names: Sequence[str] | None, docids: Sequence[str]) -> list[Variant]:
    """The rows to train, `FULL` first whether it is named or not, since all are compared with it.

    Args:
      names: of `VARIANTS`, with blanks or hyphens; all of them for None.
      docids: kinds of identifiers, a row each.

    Raises:
      UserError: a name that is unknown.
    """
    known = {variant.slug: variant for variant in VARIANTS}
    wanted = known if names is None else [name.strip().replace(" ", "-") for name in names]
    for name in wanted:
        if name not in known:
            raise UserError(f"variant {name!r} is not known; choose of {', '.join(known)}")
    for kind in docids:
        if kind not in KINDS:
            raise UserError(f"docids {kind!r} are not known; choose of {', '.join(KINDS)}")
    rows = [variant for slug, variant in known.items() if slug == FULL or slug in wanted]
    return rows + [_of_kind(kind) for kind in dict.fromkeys(docids)]


def _of_kind(kind: str) -> Variant:
    name, several = f"docids {kind}", kind != "atomic"
    return Variant(
        name,
        f"the whole method with identifiers of kind {kind}"
        + (f", and what {SEVERAL_TOKENS.name} says" if several else ""),
        "docids",
        kind,
        (f"DocidConfig.kind = {kind!r}", "DocidConfig.settings = {}"),
        usual=(SEVERAL_TOKENS,) if several else (),
        begins=name,
    )


def _with_kind(loss: Variant, kind: Variant) -> Variant:
    """A row of a loss, taken away from the method with other identifiers."""
    return dataclasses.replace(
        kind,
        name=f"{kind.name} {loss.name}",
        what=f"{kind.name}, {loss.what}",
        bindings=(*kind.bindings, *loss.bindings),
        beside=kind.name,
    )


def without_repetition(
    variants: Sequence[Variant], full: Recipe, minutes: float | None
) -> list[Variant]:
    """The variants without those that would repeat another, or leave nothing, with this recipe.

    Where the full method's docids are atomic, which share no prefix, the rows that leave one
    contrast out stand beside those of the first kind of `_PREFIXES` that has a row.

    Raises:
      UserError: a variant would leave out what the recipe has not, or all of stage 2.
    """
    config = full.contrastive
    losses = {"without prefix loss": "prefix", "without retrieval loss": "retrieval"}
    fewest = {"one view": config.pieces == 1, "no query views": True}
    kept: list[Variant] = []
    for variant in variants:
        if variant.name == f"docids {full.docids.kind}":
            log.info("%s: is %s itself", variant.name, FULL)
            continue
        loss = losses.get(variant.name)
        if variant.name == "stage 1 all the time" and minutes is None:
            log.info("%s: is stage 1 only, where steps are counted", variant.name)
            continue
        if config.queries == 0 and fewest.get(variant.name):
            log.info("%s: is %s itself", variant.name, FULL)
            continue
        if loss and not (config.prefix and config.retrieval):
            gone = "prefix" if not config.prefix else "retrieval"
            raise UserError(
                f"variant {variant.slug} makes no sense where ContrastiveConfig.{gone} is 0; "
                "give it a weight, or choose other --variants"
            )
        kept.append(variant)
    if not config.wanted:
        raise UserError(
            "ContrastiveConfig.prefix and ContrastiveConfig.retrieval are 0, and so dogr has no "
            "stage 2 to take apart; give one of them a weight above 0"
        )
    return _losses_beside_prefixes(kept, list(losses)) if full.docids.kind == "atomic" else kept


def _losses_beside_prefixes(variants: Sequence[Variant], losses: Sequence[str]) -> list[Variant]:
    """The variants with the rows of `losses` behind that of docids that share prefixes."""
    kinds = {variant.docids: variant for variant in variants if variant.group == "docids"}
    shared = next((kinds[kind] for kind in _PREFIXES if kind in kinds), None)
    found: list[Variant] = []
    for variant in variants:
        if variant.name not in losses:
            found.append(variant)
        elif not shared:
            why = "whose docids share no prefix, has one contrast"
            log.info("%s: %s, %s; give --docids hierarchical", variant.name, FULL, why)
        if variant is shared:
            found += [_with_kind(loss, shared) for loss in variants if loss.name in losses]
    return found
