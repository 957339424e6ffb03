"""Answers: an engine of slots over shared prefixes, sampling, stopping."""
