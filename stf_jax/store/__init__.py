"""What lies on disk: native checkpoints, and the directory of a run."""
