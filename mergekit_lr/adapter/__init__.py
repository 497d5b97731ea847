"""Low-rank factors with a scale, in every dialect that tools write them."""
