"""The T5X runner: `python -m t5x.train --gin_file=gin_configs/recipes/NAME.gin`.

The model, its losses, tasks and decoding are those of the native runner; here is only what T5X
asks of them. T5X itself is imported by `optimizer` and `start` alone, so that everything else can
be tested without it.

  models      RetrievalModel and RankingModel behind the methods that T5X calls
  optimizer   the native runner's optimiser and schedule, as T5X takes them
  start       the parameters that training begins with: fresh, lexical, or of a retriever
  checkpoint  T5X's checkpoints -> parameters
  data        the native runner's batches, for comparing the two
"""

import gin

from genret_jax.recipe import gin_folder

# Gin files that import this package, T5X's among them, include those of gin_configs/ by their
# short names.
gin.add_config_file_search_path(str(gin_folder()))
