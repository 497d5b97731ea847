"""Model merging and adapter surgery through the low rank of what fine-tuning changed."""
