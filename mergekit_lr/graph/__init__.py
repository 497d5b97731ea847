"""The tensor graph: what to compute, in which batches, and the pipeline that runs them."""
