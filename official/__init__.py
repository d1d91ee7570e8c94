"""Reading checkpoints of others without PyTorch: the official releases' and EDM's."""
