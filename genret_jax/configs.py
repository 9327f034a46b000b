"""The parts of a recipe: all fields that gin can reach, and what they mean.

The library behind them takes plain arguments. A gin file sets the fields
(`NetworkConfig.embed_dim = 128`); see `genret_jax.recipe`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from genret_jax.modeling.layers import T5Config


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network; see `T5Config`."""

    embed_dim: int = 128
    num_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 256
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    dropout_rate: float = 0.1
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    dtype: str = "float32"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    feed_forward: str = "gated-gelu"
    layer_norm_epsilon: float = 1e-6
    adaptor_rank: int = 0
    remat: bool = False
    scan_layers: bool = False

    def t5(self, vocab_size: int) -> T5Config:
        return T5Config(vocab_size=vocab_size, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class DocidConfig:
    """Identifiers: `kind` and its `settings`, as `genret_jax.docids.build_docids` takes them.

    Attributes:
      with_queries: the texts that terms and clusters are computed from include the document's
        train queries.
    """

    kind: str = "keywords"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    with_queries: bool = True


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
    """Text pieces.

    Attributes:
      size: pieces at most, where a vocabulary is trained on the corpus.
      model: path of a SentencePiece model to use instead; "" for none.
      casefold: lower-case, where one is trained.
      rows: of the embedding before the docid tokens, as a pretrained one has them; 0 for as many
        as there are pieces.
    """

    size: int = 4000
    model: str = ""
    casefold: bool = True
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training data.

    Attributes:
      indexing_share: share of indexing examples; below 0, the number p of train pairs a document
        decides: 8 / (8 + p), but between 0.3 and 0.7, because few queries a document are soon
        learnt by heart and pieces of the text are what is left to learn from.
      title_share, frame_share, word_dropout: see `genret_jax.data.tasks.register`.
      pseudo_share: share of pseudo-queries among the queries that docids are learned from, where
        some are given; methods of n-grams learn from both alike.
      indexing_passes: pieces drawn of each document, for the whole training, at most.
      input_length: encoder tokens; 0 lets the train queries decide (99 % of them fit).
      dev_queries: queries of an evaluation during training, at most.
      held_out: share of the train queries that are held out as dev in a corpus without dev split.
      held_out_documents: share of the documents with train queries whose queries are all held out,
        in a corpus where other documents have none: so dev tells how such documents are to be
        ranked. 50 documents at least, 5 % of those with train queries at most; 0 for none, and
        none where `held_out` is 0 and the corpus has no dev split.
      unseen_share: how much dev queries about documents without train queries count, where they are
        told apart, in dev metrics and in the weights of fusion; the other queries count the rest.
    """

    indexing_share: float = -1.0
    title_share: float = 0.3
    frame_share: float = 0.5
    word_dropout: float = 0.0
    pseudo_share: float = 0.5
    indexing_passes: int = 8
    input_length: int = 0
    dev_queries: int = 1000
    held_out: float = 0.05
    held_out_documents: float = 0.0
    unseen_share: float = 0.5


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """See `genret_jax.modeling.losses.docid_cross_entropy`.

    Attributes:
      normaliser: what the probabilities of docid tokens sum to one over, in training and search:
        the docid "vocabulary", or the "children" of the prefix in the trie, which leaves nothing to
        learn about which identifiers exist. Docids of one token, such as atomic ones, have
        "vocabulary" in either case.
      r_drop: weight of the divergence of two passes with dropout, in stage 1 alone; see
        `genret_jax.modeling.losses.symmetric_divergence`. A step then takes about twice as long.
    """

    label_smoothing: float = 0.1
    z_loss: float = 0.0
    r_drop: float = 0.0
    normaliser: str = "vocabulary"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      start: "random"; "lexical": parameters that match words from the first step on, see
        `genret_jax.training.lexical_start`; "pretrained": those of `init`, see
        `genret_jax.training.pretrained_start`.
      init: a pretrained T5, as a folder or a name on the Hugging Face hub; "" for none. It decides
        `start`, the sizes of the network, and the vocabulary.
      steps: of a run without a time budget.
      batch_size: examples of a global batch.
      optimizer, learning_rate, schedule, warmup_steps, weight_decay, anchor, clip_norm: see
        `genret_jax.training.optimizers`.
      evaluations: dev evaluations, evenly spread; the last is at the end.
      metric: the dev metric by which the best parameters are chosen.
      checkpoint_every, log_every: steps.
      model_parallel: devices that share one copy of the parameters.
      seed: of parameters, dropout, spans and order.
    """

    start: str = "random"
    init: str = ""
    steps: int = 10_000
    batch_size: int = 256
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    warmup_steps: int = 200
    weight_decay: float = 0.01
    anchor: float = 0.0
    clip_norm: float = 1.0
    evaluations: int = 8
    metric: str = "mrr@10"
    checkpoint_every: int = 200
    log_every: int = 50
    model_parallel: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """The second stage: how near a query is to a document.

    Attributes:
      generation, prefix, retrieval: weights of docid cross-entropy, InfoNCE over documents whose
        docids share a prefix, and InfoNCE over retrieved and in-batch negatives.
      rank: weight of the margin rank loss over documents, which goes with neither of those two;
        without any of the three there is no second stage.
      margin, drawn_margin: see `genret_jax.modeling.margin.margin_rank`: of log p in nats, or of
        sums of n-grams.
      vector: semantic vector; see `genret_jax.modeling.model`.
      similarity, temperature, learned_temperature, share_negatives: see
        `genret_jax.modeling.contrastive.info_nce`.
      source: who retrieves negatives: "model" (the stage-1 model's own beam) or "bm25".
      prefix_negatives, retrieved_negatives: of an example.
      prefix_depth: docid tokens in common: "deepest", "sampled", or a number as a string.
      mined: retrieved negatives kept a query, of which an example draws.
      mining_beam: of the search that retrieves them.
      refresh_every: steps after which negatives are retrieved anew; 0 for never.
      document_length: tokens of a view of a document, at most; train queries are cut to it, too.
      pieces, queries: views of a document, at most; see `genret_jax.data.views.make_views`.
      share: of a time budget.
      steps, batch_size, learning_rate, warmup_steps, evaluations: as in TrainConfig.
      chunk: rows encoded at a time (gradient caching); 0 for all at once.
      store: document vectors on disk: "float32", "bfloat16" or "int8".
    """

    generation: float = 1.0
    prefix: float = 0.0
    retrieval: float = 0.0
    rank: float = 0.0
    margin: float = 3.0
    drawn_margin: float = 4.0
    vector: str = "decoder_first"
    similarity: str = "cosine"
    temperature: float = 0.05
    learned_temperature: bool = False
    share_negatives: bool = True
    source: str = "model"
    prefix_negatives: int = 1
    retrieved_negatives: int = 1
    prefix_depth: str = "deepest"
    mined: int = 16
    mining_beam: int = 20
    refresh_every: int = 0
    document_length: int = 40
    pieces: int = 16
    queries: int = 64
    share: float = 0.4
    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    evaluations: int = 5
    chunk: int = 0
    store: str = "int8"

    @property
    def wanted(self) -> bool:
        return self.prefix > 0 or self.retrieval > 0 or self.rank > 0

    def train_config(self, config: TrainConfig) -> TrainConfig:
        """How to train this stage: `config` with what is said here."""
        names = ("steps", "batch_size", "learning_rate", "warmup_steps", "evaluations")
        return dataclasses.replace(config, **{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class SearcherConfig:
    """What is made and searched, where it is no generative retriever.

    Attributes:
      module: dotted name of a module with the functions `fit` and `load`, as
        `genret_jax.searchers` wants them; "" for a generative retriever.
      settings: for its `fit`.
    """

    module: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """A generator of queries and how it is sampled.

    Attributes:
      document_length: tokens of a passage of a document, EOS included.
      passages: of a document, at most, each with the beginning of its title; their queries are
        sampled in turn.
      query_length: pieces of a query, EOS included; longer train queries are cut.
      copying: whether pieces may be copied; see `genret_jax.modeling.query_generator`.
      top_k, temperature: see `QueryGenerator.sample`.
      held_out: share of the documents with train queries whose queries choose the best parameters
        and are not trained on.
      dev_pairs: of those, at most.
      batch_size: passages of a batch while sampling.
    """

    document_length: int = 64
    passages: int = 8
    query_length: int = 32
    copying: bool = True
    top_k: int = 20
    temperature: float = 1.0
    held_out: float = 0.05
    dev_pairs: int = 1000
    batch_size: int = 64
