"""Estimates of a run on a TPU, by the TPU compiler, on a machine without a TPU."""
