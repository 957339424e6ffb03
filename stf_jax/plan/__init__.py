"""What a run costs on a TPU, asked of the TPU compiler on a machine without one."""
