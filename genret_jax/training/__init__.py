"""The native trainer: sharding, checkpoints, the loop, and its curves."""
