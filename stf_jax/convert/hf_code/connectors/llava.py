"""LLaVA-1.5 (arXiv 2310.03744): every patch is a token. Fewer patches come from a smaller image."""

from .base_compact_llava import Connector


class CompactConnector(Connector):
    """The projector over every patch."""
