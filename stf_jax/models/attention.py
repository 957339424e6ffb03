"""Attention over heads, masked by a rule rather than by an array that the caller builds.

Splash serves `causal` on a TPU, cuDNN 16-bit numbers on a GPU, XLA everything else.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from stf_jax.models.marks import Marks, Rule, causal, visible
from stf_jax.parallel.splash import splash_attention


def attention(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S G D"],
    value: Float[Array, "B S G D"],
    *,
    marks: Marks | None = None,
    key_marks: Marks | None = None,
    rule: Rule = causal,
) -> Float[Array, "B T N D"]:
    """softmax(q k^T / sqrt(D)) v, with the softmax in float32; N is a multiple of G.

    A query that sees no key (padding) gets a finite value that means nothing.

    Args:
        query: T positions, N heads.
        key: S positions, G heads.
        value: as `key`.
        marks: of the queries; None lets every query see every key.
        key_marks: of the keys, where they are other positions than the queries.
        rule: read with `marks` only.
    """
    with jax.named_scope("attention"):
        place = platform()
        # Splash knows one rule. It goes by index, which is the same: positions ascend in a segment.
        by_index = rule is causal and key_marks is None
        if place == "tpu" and (marks is None or by_index):
            return _per_device(query, key, value, None if marks is None else marks.segment)
        cudnn = place in ("cuda", "gpu") and query.dtype in (jnp.bfloat16, jnp.float16)
        mask = None
        if marks is not None:
            mask = visible(rule, marks, marks if key_marks is None else key_marks)[:, None]
        query, key, value = (checkpoint_name(array, "attention") for array in (query, key, value))
        attended = jax.nn.dot_product_attention(
            query, key, value, mask=mask, implementation="cudnn" if cudnn else None
        )
        return checkpoint_name(attended, "attention")


def platform() -> str:
    """Where the program will run, which need not be where it is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def _per_device(query: Array, key: Array, value: Array, segments: Array | None) -> Array:
    """Splash, on each device's rows and heads: the compiler cannot split a kernel."""
    extra = () if segments is None else (segments, segments)
    kernel = partial(splash_attention, causal=segments is not None)
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(query, key, value, *extra)
    specs = tuple(jax.typeof(array).sharding.spec for array in (query, key, value, *extra))
    sharded = jax.shard_map(kernel, in_specs=specs, out_specs=specs[0], check_vma=False)
    return sharded(query, key, value, *extra)
