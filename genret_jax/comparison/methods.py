"""The rows of a comparison: methods by name, and fusions of two of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from genret_jax.errors import UserError
from genret_jax.harness.rows import Entry
from genret_jax.recipe import Recipe, description, methods
from genret_jax.searchers import is_trained, writes_docids

_FUSIONS = {
    "rrf": "reciprocal rank fusion (k = 60) of {} and {}",
    "weighted": "scores of {} and {}, each brought to 0 ... 1, with weights fitted on dev",
}


@dataclasses.dataclass(frozen=True)
class Method(Entry):
    """One row; its group is "lexical", "dense", "generative" or "hybrid".

    Attributes:
      trained: whether it is trained, and so anew with every seed.
      rule: "rrf" or "weighted", of a hybrid.
      parts: names of the two methods that a hybrid fuses.
    """

    trained: bool = True
    rule: str = ""
    parts: tuple[str, ...] = ()


def chosen_methods(names: Sequence[str], recipe: Callable[[str], Recipe]) -> list[Method]:
    """The rows: the methods in the order asked for, parts before their hybrids.

    Args:
      names: of methods, or RULE:METHOD:METHOD.
      recipe: a method's, by its name.

    Raises:
      UserError: a name that is unknown, or none at all.
    """
    rows: dict[str, Method] = {}
    for name in names:
        rule, *parts = name.split(":")
        if not parts:
            rows.setdefault(name, _method(name, recipe))
            continue
        if rule not in _FUSIONS or len(parts) != 2 or parts[0] == parts[1]:
            raise UserError(
                f"method {name!r} is not known; a fusion is rrf:A:B or weighted:A:B with two "
                "different methods"
            )
        for part in parts:
            rows.setdefault(part, _method(part, recipe))
        trained = any(rows[part].trained for part in parts)
        what = _FUSIONS[rule].format(*parts)
        rows[name] = Method(name, what, "hybrid", trained=trained, rule=rule, parts=tuple(parts))
    if not rows:
        raise UserError(f"no methods; choose of {', '.join(methods())}")
    return list(rows.values())


def _method(name: str, recipe: Callable[[str], Recipe]) -> Method:
    made = recipe(name)
    if made.searcher.module and not writes_docids(made):
        trained = is_trained(made)
        group = "dense" if trained else "lexical"
        return Method(name, description(name), group, trained=trained)
    return Method(name, description(name), "generative", docids=made.docids.kind)
