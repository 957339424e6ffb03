"""Conversations, tokens and pixels; nothing in here knows a model."""
