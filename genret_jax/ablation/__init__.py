"""What each part of the DOGR method is worth: `genret ablate`."""

from genret_jax.ablation.report import FILES, Report
from genret_jax.ablation.run import ablate

__all__ = ["FILES", "Report", "ablate"]
