"""A step: from a batch with its evidence to new weights, and to a checkpoint."""
