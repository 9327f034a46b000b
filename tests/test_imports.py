"""The one direction in which code may depend on code, and what search must not import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "genret_jax"

# A room is a module or a folder of genret_jax. It imports only from itself and from rooms above it
# (to its left in the flow of data). "__init__" is the face of the package, `import genret_jax`.
ROOMS = """
    errors files lines records trec corpus documents
    baselines evaluation significance hybrid
    docids device_trie sharded_trie trie live_trie look_ahead vocabularies top_k decoding
    precision modeling pretrained scoring judged fusion_fit ranking vectors
    recipe_checks configs recipe splitting indexing negatives data training
    weights retriever export pseudo_queries dense ngram glen stages t5x fit searchers
    harness comparison ablation quickstart
    __init__ cli_options cli_output cli __main__
""".split()  # noqa: SIM905

# (room, room to its right): imported inside a function only, so that neither needs the other to
# load. Retriever.fit(...) is `fit.fit(...)` where a user looks for it first.
SHORTCUTS = {("retriever", "fit"), ("dense", "stages"), ("ngram", "stages"), ("glen", "stages")}

# Rooms that may import TensorFlow or SeqIO by name.
TENSORFLOW_ROOMS = {"data", "t5x"}

# What search loads, and what it must not: these cost seconds of start-up, or are not needed there.
SEARCH_MODULES = [
    "genret_jax",
    "genret_jax.trie",
    "genret_jax.decoding",
    "genret_jax.modeling.model",
    "genret_jax.vocabularies",
    "genret_jax.ranking",
    "genret_jax.retriever",
    "genret_jax.dense",
    "genret_jax.ngram",
    "genret_jax.glen",
    "genret_jax.searchers",
]
NOT_ON_THE_SEARCH_PATH = ["tensorflow", "seqio", "sklearn", "matplotlib"]


def rooms_on_disk() -> set[str]:
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    return folders | {path.stem for path in PACKAGE.glob("*.py")}


def files_of(room: str) -> list[Path]:
    alone = PACKAGE / f"{room}.py"
    return [alone] if alone.is_file() else sorted((PACKAGE / room).rglob("*.py"))


def imported_modules(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, deferred ones and those for type checkers included."""
    package = ".".join(("genret_jax", *path.relative_to(PACKAGE).parts[:-1]))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*base, node.module or ""] if node.level else [node.module or ""])
            # `from genret_jax import trie` imports the room, not the face of the package.
            for alias in node.names:
                yield node.lineno, f"{module.rstrip('.')}.{alias.name}"


def imported_rooms(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    for line, module in imported_modules(tree, path):
        first, *rest = module.split(".")
        if first == "genret_jax":
            yield line, rest[0] if rest and rest[0] in ROOMS else "__init__"


def lines_of_functions(tree: ast.AST) -> set[int]:
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return {line for n in functions for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}


def breaches(room: str, source: str, path: Path) -> list[str]:
    tree = ast.parse(source)
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    deferred = lines_of_functions(tree)
    return [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {other}, to the right of {room}"
        for line, other in imported_rooms(tree, path)
        if other not in allowed and not ((room, other) in SHORTCUTS and line in deferred)
    ]


def test_the_table_is_the_tree():
    assert len(ROOMS) == len(set(ROOMS))
    assert set(ROOMS) == rooms_on_disk(), "mend ROOMS, or the place of the module"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_to_its_left(room):
    files = files_of(room)
    assert files, f"genret_jax/{room} is not there"
    found = [breach for path in files for breach in breaches(room, path.read_text("utf-8"), path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in TENSORFLOW_ROOMS])
def test_tensorflow_stays_in_its_rooms(room):
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {module}"
        for path in files_of(room)
        for line, module in imported_modules(ast.parse(path.read_text("utf-8")), path)
        if module.split(".")[0] in {"tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio"}
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "source", "caught"),
    [
        ("trie", "from genret_jax.docids.table import DocidTable", False),
        ("trie", "from genret_jax.decoding import BeamResult", True),
        ("trie", "import genret_jax.decoding as decoding", True),
        ("trie", "from genret_jax import decoding", True),
        ("trie", "from genret_jax import docids", False),
        ("trie", "from . import decoding", True),
        ("trie", "from .decoding import BeamResult", True),
        ("trie", "from genret_jax import anything_of_its_face", True),
        ("trie", "def f():\n    from genret_jax.decoding import BeamResult", True),
        ("trie", "import numpy", False),
        ("retriever", "def f():\n    from genret_jax.fit import fit", False),
        ("retriever", "from genret_jax.fit import fit", True),
        ("cli", "from genret_jax import __version__", False),
    ],
)
def test_the_rule_catches_what_it_should(room, source, caught):
    assert bool(breaches(room, source, PACKAGE / f"{room}.py")) == caught


def test_a_relative_import_in_a_folder_is_understood():
    inside = PACKAGE / "docids" / "table.py"
    assert breaches("docids", "from ..trie import Trie", inside)
    assert not breaches("docids", "from .report import report", inside)
    assert not breaches("docids", "from ..errors import UserError", inside)


def test_every_shortcut_is_taken():
    for room, other in SHORTCUTS:
        assert any(
            imported == other
            for path in files_of(room)
            for _, imported in imported_rooms(ast.parse(path.read_text("utf-8")), path)
        ), f"{room} no longer imports {other}: take the pair out of SHORTCUTS"


def test_search_imports_nothing_of_training():
    code = (
        "import importlib, sys\n"
        f"for name in {SEARCH_MODULES}:\n"
        "    importlib.import_module(name)\n"
        f"    found = [other for other in {NOT_ON_THE_SEARCH_PATH} if other in sys.modules]\n"
        "    if found: sys.exit(f'{name} imports {found}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
