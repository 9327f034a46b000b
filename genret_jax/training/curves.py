"""Loss and dev metrics over steps, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genret_jax.files import replace_on_success

_SHOWN = ("hits@1", "mrr@10", "hits@10", "token_probability")
_FEW = 20  # points that are marked one by one: two with a line alone look like a course


def draw_curves(records: Sequence[dict[str, Any]], path: str | Path, *, title: str = "") -> None:
    """Writes a PNG with the training loss on the left and the dev metrics on the right.

    Args:
      records: lines of metrics.jsonl: dicts with "kind" ("train" or "dev"), "step" and numbers.
      path: of the PNG.
      title: above both.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [r for r in records if r["kind"] == "train"]
    dev = [r for r in records if r["kind"] == "dev"]
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [r["step"] for r in train]
    # The loss of docids where there is one, so that runs with other terms compare.
    docids = not train or "cross_entropy" in train[0]
    losses = [r["cross_entropy" if docids else "loss"] for r in train]
    left.plot(steps, losses, color="C0", marker="o" if len(steps) <= _FEW else None)
    label = "cross-entropy a token (nats)" if docids else "InfoNCE a query (nats)"
    left.set(xlabel="step", ylabel=label, title="training loss")
    if train:
        left.set_ylim(bottom=0)
    for i, name in enumerate(n for n in _SHOWN if dev and n in dev[0]):
        values = [r[name] for r in dev]
        right.plot([r["step"] for r in dev], values, marker="o", color=f"C{i + 1}", label=name)
        right.annotate(
            f"{values[-1]:.3f}",
            (dev[-1]["step"], values[-1]),
            textcoords="offset points",
            xytext=(6, -3),
            color=f"C{i + 1}",
        )
    right.set(xlabel="step", title="dev", ylim=(0, 1.02))
    last = max((r["step"] for r in records), default=0)
    for axes in (left, right):  # both from the first step to the last, and whole steps alone
        axes.set_xlim(-0.03 * last - 0.5, 1.03 * last + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if dev:
        right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    with replace_on_success(path) as temporary:
        figure.savefig(temporary, format="png")
