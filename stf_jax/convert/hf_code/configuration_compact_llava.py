"""The configuration of a LLaVA that shows its language model an image in few tokens."""

from transformers import LlavaConfig


class CompactLlavaConfig(LlavaConfig):
    """LLaVA's, and how patches become tokens.

    Attributes:
        compact: `kind` (the system), `taps` (hidden states of the tower that are read, 0 is the
            embedding), `image_size` (the side in pixels at which the tower sees an image), and the
            system's own fields, which `connector_compact_llava.py` reads.
        image_seq_length: tokens of an image.
    """

    model_type = "compact_llava"

    compact: dict | None = None
