"""Whose a folder is: one run's, and at any time one training's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from genret_jax.errors import UserError
from genret_jax.files import held, replace_on_success
from genret_jax.recipe import Recipe
from genret_jax.training import processes


@contextlib.contextmanager
def claimed(out: Path, recipe: Recipe, digest: str) -> Iterator[None]:
    """Marks the folder as this run's, or finds that it is, and keeps other trainings out.

    A time budget is not part of a run's identity: it may be raised when it goes on. Processes that
    train together claim together; the first one keeps others out.

    Args:
      digest: of everything else that the run depends on.

    Raises:
      UserError: the folder is of another run, or of no run, or another process trains in it.
    """
    with contextlib.ExitStack() as stack:

        def put_mark() -> None:
            _mark(out, recipe, digest)
            stack.enter_context(held(out))

        processes.on_first(put_mark)
        processes.see(out / "run.json")
        yield


def _mark(out: Path, recipe: Recipe, digest: str) -> None:
    mark = out / "run.json"
    made = any((out / name).exists() for name in ("index", "training", "ranking", "retriever"))
    if mark.is_file() and made:
        found = json.loads(mark.read_text())
        if found.get("run") != digest:
            before = found.get("recipe", {}).get("checkpoint", "")
            if recipe.checkpoint != before and recipe.checkpoint and before:
                raise UserError(
                    f"{out}: was begun with other files than those now at "
                    f"{recipe.train.init}; put those back, or choose another --out"
                )
            raise UserError(
                f"{out}: holds a run of another recipe or corpus; choose another --out, "
                "or delete the folder"
            )
        return
    # A name with a dot is what a killed process had not yet put into its place.
    names = [p for p in out.iterdir() if p != mark and p.name[0] != "."] if out.is_dir() else []
    if names and not made:
        raise UserError(f"{out}: exists and is not a run of genret_jax; choose another --out")
    with replace_on_success(mark) as temporary:
        temporary.write_text(json.dumps({"run": digest, "recipe": recipe.to_dict()}, indent=1))
