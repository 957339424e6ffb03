"""Mesh, sharding rules, and the attention kernel for each platform."""
