"""Reading checkpoints of the official PyTorch releases without PyTorch."""
