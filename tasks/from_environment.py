"""Tasks of one run, registered on import: for programs that take module names, not arguments.

    export GENRET_CORPUS=my_corpus GENRET_RUN=runs/mine
    seqio_cache_tasks --module_import=tasks.from_environment --tasks='genret_.*' \
        --output_cache_dir=cache

GENRET_NAME names the mixture (default "genret"), GENRET_PSEUDO_QUERIES a file of pseudo-queries, if
one is to be learned from. `seqio_cache_tasks` needs Apache Beam, which is not among the
requirements. Cached are the tokenised examples; what is drawn anew in every epoch (pieces of
documents, words left out) is drawn when they are read.
"""

from __future__ import annotations

import os

from genret_jax.errors import UserError
from tasks.folder import register_folder

try:
    _corpus, _run = os.environ["GENRET_CORPUS"], os.environ["GENRET_RUN"]
except KeyError as error:
    raise UserError(f"{error} is not set; export GENRET_CORPUS and GENRET_RUN") from None

registered = register_folder(
    _corpus,
    _run,
    name=os.environ.get("GENRET_NAME", "genret"),
    pseudo_queries=os.environ.get("GENRET_PSEUDO_QUERIES"),
)
