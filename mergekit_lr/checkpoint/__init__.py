"""Reading and writing the tensors of a model, and what each of them is."""
