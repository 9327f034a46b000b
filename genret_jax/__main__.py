"""`python -m genret_jax VERB` is `genret VERB`."""

import sys

from genret_jax.cli import main

sys.exit(main())
