"""Whether a difference between two searchers is more than chance: paired tests, and many of them.

The randomisation test is in `evaluation`; here are the t-test beside it, Holm's correction, and
what tables want: one searcher against several others.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from genret_jax.errors import UserError
from genret_jax.evaluation import randomisation_test

# What differences are tested in: the best place, and the place of the first right document.
TESTED_METRICS = ("hits@1", "mrr@10")

PerQuery = Mapping[str, npt.NDArray[np.float64]]
"""Metric -> float64[queries], as `evaluation.per_query` gives it."""


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two searchers on the same queries, in one metric.

    Attributes:
      difference: mean of the first less mean of the second.
      t_test, randomisation: two-sided p values.
      t_test_holm, randomisation_holm: the same, corrected for the number of comparisons made
        together; equal to them where there was one.
    """

    difference: float
    t_test: float
    randomisation: float
    t_test_holm: float
    randomisation_holm: float


def paired(a: npt.ArrayLike, b: npt.ArrayLike) -> Paired:
    """Both tests of `a` against `b`, uncorrected.

    Args:
      a, b: float[queries], the same queries in the same order.

    Raises:
      UserError: as `randomisation_test`.
    """
    chance = randomisation_test(a, b)  # first, for it checks what it is given
    t = t_test(a, b)
    difference = np.asarray(a, np.float64).mean() - np.asarray(b, np.float64).mean()
    return Paired(float(difference), t, chance, t, chance)


def t_test(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Two-sided p value of the paired t-test.

    Where the test says nothing, because there is one query or no query differs, it is 1; where all
    queries differ by the same, it is 0.

    Args:
      a, b: float[queries], the same queries in the same order.

    Raises:
      UserError: different lengths, or no queries.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise UserError(
            f"t-test: values of shapes {first.shape} and {second.shape}; give two equally long "
            "lists, one value a query, in the same order"
        )
    if first.size == 1 or (first == second).all():
        return 1.0
    from scipy import stats  # half a second, which searching need not wait for

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal differences, which is said above
        return float(stats.ttest_rel(first, second).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected by Holm (1979): below 0.05 are those that stand at a familywise 0.05.

    The smallest of m is multiplied by m, the next by m - 1 and so on; none ends below a smaller
    one, or above 1.

    Example:
      >>> holm([0.01, 0.04, 0.03])
      [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(values)
    least = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = least
    return corrected


def against(
    reference: PerQuery, others: Mapping[str, PerQuery], metrics: Sequence[str] = TESTED_METRICS
) -> dict[str, dict[str, Paired]]:
    """Several searchers against one; each metric's comparisons are one family for the correction.

    Args:
      reference: what the others are compared with.
      others: name -> values on the same queries in the same order.
      metrics: keys of all of these.

    Returns:
      name -> metric -> the comparison; a difference above 0 is in favour of the name.
    """
    tested: dict[str, dict[str, Paired]] = {name: {} for name in others}
    for metric in metrics:
        found = [paired(values[metric], reference[metric]) for values in others.values()]
        t_tests = holm([one.t_test for one in found])
        randomisations = holm([one.randomisation for one in found])
        for name, one, t, chance in zip(others, found, t_tests, randomisations, strict=True):
            tested[name][metric] = dataclasses.replace(
                one, t_test_holm=t, randomisation_holm=chance
            )
    return tested
