"""Tasks over any BEIR folder and the run that `genret index` or `genret fit` made of it.

    from tasks.folder import register_folder
    made = register_folder("my_corpus", "runs/mine")
    seqio.get_dataset(made.mixture, made.lengths, seqio.EncDecFeatureConverter(pack=False))

The same tasks that the native trainer reads, for everything that takes a SeqIO mixture by name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import seqio

from genret_jax.corpus import read_corpus
from genret_jax.data.examples import make_examples
from genret_jax.data.tasks import register
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.indexing import Index
from genret_jax.recipe import DataConfig
from genret_jax.splitting import split_corpus


@dataclasses.dataclass(frozen=True)
class Registered:
    """Attributes:
    mixture: name of the mixture; NAME_retrieval and NAME_indexing are its tasks.
    lengths: {"inputs", "targets"}: what `task_feature_lengths` should be.
    """

    mixture: str
    lengths: dict[str, int]


def register_folder(
    corpus: str, run: str, *, name: str = "folder", data: DataConfig | None = None, seed: int = 0
) -> Registered:
    """Registers retrieval, indexing and their mixture for a corpus and its index.

    Args:
      corpus: BEIR folder.
      run: folder with the index of that corpus.
      name: of the mixture.
      data: rates and lengths.
      seed: of the held-out queries; the seed of the fit, so that both train on the same.
    """
    data = data or DataConfig()
    read = read_corpus(corpus)
    index = Index.load(Path(run) / "index")
    split = split_corpus(read, data, seed=seed)
    examples = make_examples(read.documents, split.pairs, index.vocabulary, index.table)
    register(
        name,
        examples,
        SeqioVocabulary(index.vocabulary),
        indexing_share=examples.indexing_share(data.indexing_share),
        title_share=data.title_share,
        frame_share=data.frame_share,
        word_dropout=data.word_dropout,
    )
    length = data.input_length or examples.input_length()
    return Registered(name, {"inputs": length, "targets": index.trie.max_length})


def vocabulary(run: str) -> seqio.Vocabulary:
    """The vocabulary of a run, for gin files."""
    return SeqioVocabulary.load(Path(run) / "index")
