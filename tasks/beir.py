"""A collection of BEIR: its zip file, unpacked and looked at.

    python -m tasks.beir scifact.zip --out scifact
    genret fit scifact --out runs/scifact

A folder of BEIR needs no program: `genret fit` reads it as it is. (TensorFlow Datasets has `beir`,
too, but its builder joins each judged passage to one question alone, so that of a passage that
answers several questions the other judgements are lost; and it needs Apache Beam. Take the zip.)
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from genret_jax.corpus import read_corpus
from genret_jax.errors import UserError
from genret_jax.files import replace_on_success
from tasks.command import run

SOURCE = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/{}.zip"
# What is taken of a collection's folder: nothing else is in them that is read here.
_WANTED = re.compile(r"(corpus|queries)\.jsonl|qrels/[^/]+\.tsv")


def unpack(archive: str | Path, out: str | Path, *, subset: str = "") -> dict[str, Any]:
    """Unpacks a collection into a BEIR folder, whole or not at all.

    Args:
      archive: zip file; a name such as "scifact" or a path where no file is says where to get it.
      out: the folder, which is not there yet.
      subset: which of several collections in one file, such as "android" of cqadupstack.

    Returns:
      Counts of documents, queries and judgements of each split, and warnings.

    Raises:
      UserError: no such file, no zip file, no collection or several in it, `out` is there, or what
        `read_corpus` says of the files.
    """
    archive, out = Path(archive), Path(out)
    if not archive.is_file():
        name = archive.name.removesuffix(".zip")
        raise UserError(f"{archive}: no such file; get it from {SOURCE.format(name)}")
    if out.exists():
        raise UserError(f"{out}: exists; give another --out")
    try:
        with zipfile.ZipFile(archive) as packed, replace_on_success(out) as temporary:
            for name, place in _members(packed, archive, subset).items():
                (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                with packed.open(name) as source, (temporary / place).open("wb") as target:
                    shutil.copyfileobj(source, target)
            corpus = read_corpus(temporary)  # a broken collection is not left there
            warnings = [line.replace(str(temporary), str(out)) for line in corpus.warnings]
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: no zip file, or damaged ({error}); fetch it again") from error
    return {
        "documents": len(corpus.documents),
        "queries": len(corpus.queries),
        "judgements": {s: sum(map(len, q.values())) for s, q in corpus.qrels.items()},
        "warnings": warnings,
    }


def _members(packed: zipfile.ZipFile, archive: Path, subset: str) -> dict[str, str]:
    """Name in the archive -> place in the folder, of one collection."""
    found = [PurePosixPath(name) for name in packed.namelist()]
    homes = {str(path.parent) for path in found if path.name == "corpus.jsonl"}
    if subset:
        homes = {home for home in homes if PurePosixPath(home).name == subset}
    if len(homes) != 1:
        names = ", ".join(sorted(PurePosixPath(home).name for home in homes)) or "none"
        raise UserError(
            f"{archive}: not one collection in it but {len(homes)} ({names}); "
            + ("name one with --subset" if homes else "give the zip file of a BEIR collection")
        )
    home = homes.pop()
    places = {str(path): str(path.relative_to(home)) for path in found if path.is_relative_to(home)}
    return {name: place for name, place in places.items() if _WANTED.fullmatch(place)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", help="zip file of a collection")
    parser.add_argument("--out", required=True, help="BEIR folder to write")
    parser.add_argument("--subset", default="", help="which of several collections in one file")
    arguments = parser.parse_args()
    report = unpack(arguments.archive, arguments.out, subset=arguments.subset)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run(main)
