"""What a method is: identifiers, network, data, losses and schedule, written in gin.

Gin files set the fields of `genret_jax.configs` and include one another, and command-line bindings
come last.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin

from genret_jax.configs import (
    ContrastiveConfig,
    DataConfig,
    DocidConfig,
    GenerationConfig,
    LossConfig,
    NetworkConfig,
    SearcherConfig,
    TrainConfig,
    VocabularyConfig,
)
from genret_jax.errors import UserError
from genret_jax.pretrained.checkpoint import Checkpoint, decided, open_checkpoint
from genret_jax.recipe_checks import check_part

_PACKAGE = Path(__file__).resolve().parent
_PRETRAINED = "pretrained.gin"  # over a method's own schedule, where it begins with a trained T5


@dataclasses.dataclass(frozen=True)
class GeneratorRecipe:
    """Everything that decides what a generator of queries is, besides its corpus.

    Of `data`, only what decides which train queries are held out as dev is looked at: give `fit`'s.
    `train.start` and `train.metric` are a retriever's and not looked at.
    """

    network: NetworkConfig
    vocabulary: VocabularyConfig
    data: DataConfig
    loss: LossConfig
    train: TrainConfig
    generation: GenerationConfig

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run does, besides its corpus.

    Attributes:
      checkpoint: digest of the files of TrainConfig.init; "" without one.
    """

    method: str
    network: NetworkConfig
    docids: DocidConfig
    vocabulary: VocabularyConfig
    data: DataConfig
    loss: LossConfig
    train: TrainConfig
    contrastive: ContrastiveConfig
    checkpoint: str = ""
    searcher: SearcherConfig = SearcherConfig()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_PARTS = {
    "network": NetworkConfig,
    "docids": DocidConfig,
    "vocabulary": VocabularyConfig,
    "data": DataConfig,
    "loss": LossConfig,
    "train": TrainConfig,
    "contrastive": ContrastiveConfig,
    "generation": GenerationConfig,
    "searcher": SearcherConfig,
}
_CONFIGURABLE = {
    name: gin.external_configurable(part, name=part.__name__) for name, part in _PARTS.items()
}


def gin_folder() -> Path:
    """Where the gin files are: in the installed package, or beside it in a checkout."""
    inside = _PACKAGE / "gin_configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "gin_configs"


def methods() -> list[str]:
    """Names that `--method` takes."""
    return sorted(p.stem for p in (gin_folder() / "methods").glob("*.gin"))


def description(method: str) -> str:
    """The first sentence of the comment that a method's gin file begins with."""
    lines = (gin_folder() / "methods" / f"{method}.gin").read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.lstrip("# ") for line in comment)
    end = re.search(r"[.](?= [A-Z]|$)", text)
    return text[: end.start()] if end else text


def sizes() -> list[str]:
    """Names that `--size` takes."""
    return sorted(p.stem for p in (gin_folder() / "models").glob("*.gin"))


def configured(method: str = "gin") -> Recipe:
    """The recipe that gin's present configuration describes, for programs that T5X starts.

    Args:
      method: its name, for messages and reports.

    Raises:
      UserError: for a value of the wrong type or range.
    """
    parts = _parts(Recipe)
    if init := parts["train"].init:
        raise UserError(
            f"TrainConfig.init is {init!r}, and T5X does not begin with it; train a step of "
            "`genret fit --init` with --stage 1, and begin with that retriever "
            "(start.from_retriever)"
        )
    return Recipe(method=method, **parts)


def _parts(recipe: type) -> dict[str, Any]:
    """The parts of a kind of recipe as gin's present configuration has them, checked."""
    names = [field.name for field in dataclasses.fields(recipe) if field.name in _PARTS]
    parts = {name: _CONFIGURABLE[name]() for name in names}
    for part in parts.values():
        check_part(part)
    return parts


def load_recipe(
    method: str,
    *,
    size: str | None = None,
    init: str | None = None,
    gin_files: Sequence[str | Path] = (),
    bindings: Sequence[str] = (),
) -> Recipe:
    """Reads a method's gin file, then a size, further files, and bindings, each over the last.

    Args:
      method: one of `methods()`.
      size: one of `sizes()`; the method's own by default.
      init: a pretrained T5 to begin with; the same as `TrainConfig.init`. What it decides stands
        over the method's gin file, and nothing after that may contradict it.
      gin_files: further files.
      bindings: lines of gin, such as "TrainConfig.steps = 100".

    Raises:
      UserError: for a name or a line that does not exist or does not parse, a value of the
        wrong type or range, or one that contradicts the pretrained T5.
    """
    base = _named("method", "methods", method, methods())
    files, what = _files(size, gin_files), f"method {method}"
    lines = [*bindings, *([f"TrainConfig.init = {init!r}"] if init is not None else [])]
    parts = _read(Recipe, [base, *files], lines, what=what)
    if parts["searcher"].module and parts["loss"].normaliser != LossConfig.normaliser:
        raise UserError(
            f"LossConfig.normaliser is {parts['loss'].normaliser!r}, but method {method} has no "
            "docids in a trie while it trains; leave it out"
        )
    if parts["train"].init:
        checkpoint = open_checkpoint(parts["train"].init)
        dropout = {"NetworkConfig.dropout_rate": checkpoint.config.dropout_rate}
        said = {**decided(checkpoint), **dropout}
        layer: list[Path | str] = [
            gin_folder() / _PRETRAINED,
            *(f"{k} = {v!r}" for k, v in said.items()),
        ]
        parts = _read(Recipe, [base, *layer, *files], lines, what=what)
        _check_agreement(parts, checkpoint)
        if Path(parts["train"].init).expanduser().is_dir():  # one run, from wherever it is asked
            parts["train"] = dataclasses.replace(parts["train"], init=str(checkpoint.folder))
        return Recipe(method=method, checkpoint=checkpoint.digest, **parts)
    if parts["train"].start == "pretrained":
        raise UserError("TrainConfig.start is 'pretrained', but no model is given; give --init")
    return Recipe(method=method, **parts)


def load_generator_recipe(
    *,
    size: str | None = None,
    gin_files: Sequence[str | Path] = (),
    bindings: Sequence[str] = (),
) -> GeneratorRecipe:
    """The same for a generator of queries, which begins with generators/doc2query.gin."""
    base = gin_folder() / "generators" / "doc2query.gin"
    sources = [base, *_files(size, gin_files)]
    recipe = GeneratorRecipe(
        **_read(GeneratorRecipe, sources, bindings, what="the query generator")
    )
    for name in ("r_drop", "normaliser"):
        if (found := getattr(recipe.loss, name)) != getattr(LossConfig, name):
            raise UserError(
                f"LossConfig.{name} is {found!r}, and a generator of queries has no such "
                "loss; leave it out"
            )
    return recipe


def _files(size: str | None, more: Sequence[str | Path]) -> list[Path]:
    """Gin files that exist: of a size, and further ones."""
    files = [_named("size", "models", size, sizes())] if size else []
    files += map(Path, more)
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such gin file")
    return files


def _read(
    recipe: type, sources: Sequence[Path | str], bindings: Sequence[str], *, what: str
) -> dict[str, Any]:
    """The parts of a recipe from gin files (paths) and lines of gin, each over the last."""
    gin.clear_config()
    gin.add_config_file_search_path(str(gin_folder()))
    logging.disable(logging.ERROR)  # gin reports every place where an include is not
    try:
        for source in sources:
            if isinstance(source, Path):
                gin.parse_config_file(str(source))
            else:
                gin.parse_config(source)
        gin.parse_config(list(bindings))
        return _parts(recipe)
    except (ValueError, SyntaxError, TypeError, AttributeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = lines[0].strip('"') if lines else repr(error)
        raise UserError(
            f"recipe of {what}, its gin files and --gin: {found.rstrip('.')}; the fields that "
            "there are stand in genret_jax/configs.py"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
        gin.clear_config()


def _check_agreement(parts: dict[str, Any], checkpoint: Checkpoint) -> None:
    """That nothing was said after the pretrained T5 that it does not allow."""
    init = parts["train"].init
    classes = {type(part).__name__: part for part in parts.values()}
    for name, value in decided(checkpoint).items():
        part, field = name.split(".")
        if (found := getattr(classes[part], field)) != value:
            raise UserError(
                f"{name} is {found!r}, but {init} has {value!r}; leave out what sets it (a line of "
                "gin, --size), or --init"
            )
    if parts["train"].start != "pretrained":
        raise UserError(
            f"TrainConfig.start is {parts['train'].start!r}, but {init} is to begin with; leave "
            "out what sets it (a line of gin, --size), or --init"
        )
    if not parts["vocabulary"].model:
        raise UserError(
            f"{checkpoint.folder}: no spiece.model, and a pretrained T5 reads no other pieces; "
            "put it there, or give VocabularyConfig.model"
        )


def _named(what: str, folder: str, name: str, names: Sequence[str]) -> Path:
    if name not in names:
        raise UserError(f"{what} {name!r} is not known; choose one of {', '.join(names)}")
    return gin_folder() / folder / f"{name}.gin"
