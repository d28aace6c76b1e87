"""Several ranks: the sharded strategy, its checkpoints, and what ranks agree on."""
