"""Stage 2 of LTRGR: docids go on being learned, and documents are told apart by a margin.

mine what the model itself ranks wrongly -> train with cross-entropy and the margin rank loss
"""

from __future__ import annotations

from pathlib import Path

from genret_jax.data.contrastive import ContrastiveBatches, DocumentSide, with_documents
from genret_jax.modeling.margin import MarginModel
from genret_jax.modeling.model import Params
from genret_jax.stages.common import Materials
from genret_jax.stages.first import dev_evaluation
from genret_jax.stages.second import Miner, SecondStage
from genret_jax.training.budget import Clock
from genret_jax.training.trainer import train

_NEGATIVES = 2  # the best-ranked, and one that is drawn


def train_margin(materials: Materials, params: Params, folder: Path, clock: Clock) -> SecondStage:
    """Trains with the margin rank loss from the parameters of stage 1, or goes on doing so.

    Args:
      materials: the corpus, made ready.
      params: of stage 1, on the host.
      folder: of this stage: negatives, checkpoints and metrics.
      clock: of the whole run.
    """
    recipe, config = materials.recipe, materials.recipe.contrastive
    miner = Miner(materials, folder / "negatives", clock)
    docids = materials.index.vocabulary.docids
    pools = [with_documents(p, materials.examples, miner.positives) for p in materials.pools]
    drawn = materials.batches(pools, batch_size=config.batch_size)
    batches = ContrastiveBatches(
        drawn,
        DocumentSide.of(materials.examples, miner.positives, docids, config),
        miner.questions,
        miner.negatives(0, params, drawn),
        prefix=0,
        retrieved=_NEGATIVES,
        seed=recipe.train.seed,
        top_first=True,
    )

    def refresh(step: int, now: Params) -> None:
        batches.negatives = miner.negatives(step, now, drawn)

    evaluate = dev_evaluation(materials)
    result = train(
        MarginModel(
            materials.model,
            generation=config.generation,
            rank=config.rank,
            margin=config.margin,
            drawn_margin=config.drawn_margin,
        ),
        batches,
        config=config.train_config(recipe.train),
        folder=folder,
        evaluate=evaluate,
        compile_evaluation=evaluate and evaluate.compile,
        clock=clock,
        start=lambda _: params,
        refresh=refresh if config.refresh_every else None,
        refresh_every=config.refresh_every,
        measuring=materials.measuring,
    )
    return SecondStage(result, {"negatives": batches.negatives.report()})
