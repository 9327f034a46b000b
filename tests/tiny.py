"""A small collection with sense in it, shared by the tests of several rooms."""

from __future__ import annotations

from genret_jax.corpus import Corpus, Document
from genret_jax.modeling.layers import T5Config

_TOPICS = {
    "lifts": ("Lift mechanics", "install and repair lifts, hoists and escalators in buildings"),
    "bread": ("Bakers", "mix dough and bake bread, rolls and cakes in an oven"),
    "teeth": ("Dentists", "treat teeth and gums and fill cavities of patients"),
    "roofs": ("Roofers", "cover roofs with tiles, slate, shingles and tar"),
    "bees": ("Beekeepers", "keep bees in hives and harvest honey and wax"),
    "maps": ("Cartographers", "draw maps from surveys, aerial photographs and satellite data"),
    "locks": ("Locksmiths", "open locks, cut keys and repair safes"),
    "trees": ("Foresters", "plant trees, thin forests and fight fires in woodland"),
}
_FORMS = {
    "train": ("who works with {}", "{} job", "I need help with {}", "{} and {}", "somebody for {}"),
    "dev": ("a person for {}",),
    "test": ("find {} people",),
}


def tiny_corpus() -> Corpus:
    """Eight documents, five train queries and one dev and test query each."""
    documents, queries, qrels = [], {}, {}
    for name, (title, text) in _TOPICS.items():
        documents.append(Document(name, title, text))
        words = [w.strip(",") for w in text.split() if len(w) > 4]
        for split, forms in _FORMS.items():
            for number, form in enumerate(forms):
                query = f"{name}-{split}-{number}"
                queries[query] = form.format(words[number % len(words)], name)
                qrels.setdefault(split, {})[query] = {name: 1}
    return Corpus(tuple(documents), queries, qrels, name="tiny")


# A network for tests of the model alone; they choose the vocabulary.
SMALL_NETWORK = T5Config(
    vocab_size=64,
    embed_dim=16,
    num_heads=2,
    head_dim=4,
    mlp_dim=24,
    num_encoder_layers=1,
    num_decoder_layers=1,
    relative_buckets=8,
    relative_max_distance=16,
)


def asked_questions(materials, steps: range) -> list[int]:
    """Rows of the questions that batches of a second stage ask in some of its steps."""
    from genret_jax.data.contrastive import with_documents
    from genret_jax.negatives import known_positives

    positives = known_positives(materials.split.all_pairs)
    pools = [with_documents(pool, materials.examples, positives) for pool in materials.pools]
    size = materials.recipe.contrastive.batch_size
    drawn = materials.batches(pools, batch_size=size)
    return sorted({row for n in steps for row in drawn.whole(n)["question_index"].tolist()})


# Bindings that make a fit of the tiny corpus a matter of seconds.
FAST = (
    "NetworkConfig.embed_dim = 16",
    "NetworkConfig.num_heads = 2",
    "NetworkConfig.head_dim = 8",
    "NetworkConfig.mlp_dim = 32",
    "NetworkConfig.num_encoder_layers = 1",
    "NetworkConfig.num_decoder_layers = 1",
    "VocabularyConfig.size = 200",
    "TrainConfig.batch_size = 16",
    "TrainConfig.steps = 30",
    "TrainConfig.warmup_steps = 5",
    "TrainConfig.evaluations = 3",
    "TrainConfig.checkpoint_every = 10",
    "TrainConfig.log_every = 5",
    "DataConfig.input_length = 8",  # of most inputs: batches are of one length, and compile once
    "ContrastiveConfig.steps = 20",
    "ContrastiveConfig.batch_size = 16",
    "ContrastiveConfig.warmup_steps = 2",
    "ContrastiveConfig.evaluations = 2",
    "ContrastiveConfig.document_length = 16",
    "ContrastiveConfig.mining_beam = 4",
    "ContrastiveConfig.mined = 4",
)
