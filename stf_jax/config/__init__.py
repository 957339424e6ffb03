"""What is read from YAML, and what CLIP and LLaMA are."""
