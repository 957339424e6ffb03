"""The nine benchmarks: questions in, answers as jsonl, submission files and scores out; no jax."""
