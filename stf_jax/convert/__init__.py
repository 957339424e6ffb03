"""PyTorch checkpoints to native ones and back, bit for bit.

`open_source` reads any PyTorch layout leaf by leaf; `import_checkpoint` writes it down as a native
checkpoint, `export_checkpoint` turns one back, `inspect_checkpoint` says what a directory holds.
"""

from stf_jax.convert.exporter import export_checkpoint
from stf_jax.convert.importer import import_checkpoint
from stf_jax.convert.inspect import Report, inspect_checkpoint
from stf_jax.convert.source import Source, open_source

__all__ = [
    "Report",
    "Source",
    "export_checkpoint",
    "import_checkpoint",
    "inspect_checkpoint",
    "open_source",
]
