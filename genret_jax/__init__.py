"""genret_jax: generative retrieval in JAX.

    from genret_jax import Retriever

    retriever = Retriever.fit("my_corpus", out="runs/mine", minutes=15)
    for hit in retriever.search("who fixes lifts?"):
        print(hit.rank, hit.score, hit.docid, hit.title)

The parts can be used alone: `docids.build.build_docids`, `trie.build_trie`, and
`decoding.constrained_beam_search` over any JAX step function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genret_jax.corpus import Corpus, Document, read_corpus
    from genret_jax.decoding import BeamResult, constrained_beam_search
    from genret_jax.device_trie import DeviceTrie
    from genret_jax.docids.build import build_docids
    from genret_jax.docids.table import DocidTable
    from genret_jax.errors import UserError
    from genret_jax.retriever import RetrievedDocument, Retriever
    from genret_jax.trie import Trie, build_trie

__version__ = "0.1.0"

_HOMES = {
    "BeamResult": "decoding",
    "Corpus": "corpus",
    "DeviceTrie": "device_trie",
    "DocidTable": "docids.table",
    "Document": "corpus",
    "RetrievedDocument": "retriever",
    "Retriever": "retriever",
    "Trie": "trie",
    "UserError": "errors",
    "build_docids": "docids.build",
    "build_trie": "trie",
    "constrained_beam_search": "decoding",
    "read_corpus": "corpus",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import genret_jax` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'genret_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"genret_jax.{_HOMES[name]}"), name)
