"""The infrastructure of a run: processes, folders, checkpoints and logs."""
