"""Answers: prefill in length buckets, decoding in one jitted loop, sampling, stopping."""
