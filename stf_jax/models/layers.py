"""Linear layers, norms and the stacking of equal layers: what the tower and the decoder share.

Every parameter is declared once, with its shape, initializer and partition spec. A layer computes
in the dtype of its parameters; norms and softmax work in float32 inside.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stf_jax.config.quantization import Scheme
from stf_jax.models.lora import LoRA, LoRAConfig
from stf_jax.models.quantization import QuantizedKernel
from stf_jax.parallel.sharding import ShardingRules, all_gather_fsdp

Remat = Literal["none", "dots", "attention", "full"]

# What the backward pass finds stored of each layer, by the names that the layer gives: everything,
# what attention takes and finds, that and what the MLP takes and its first matmuls find, or only
# what went in.
_policies = jax.checkpoint_policies
REMAT = {
    "none": _policies.everything_saveable,
    "dots": _policies.save_only_these_names("attention", "mlp"),
    "attention": _policies.save_only_these_names("attention"),
    "full": _policies.nothing_saveable,
}

Layer = TypeVar("Layer", bound=nnx.Module)
Carry = TypeVar("Carry")
Kept = TypeVar("Kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """How parameters come into being: random keys, dtype, and where they lie.

    In `training` modules have a key for their noise, if they draw any.
    """

    rngs: nnx.Rngs
    rules: ShardingRules = ShardingRules.none()
    dtype: DTypeLike = jnp.float32
    training: bool = False

    def normal(
        self, *shape: int, spec: PartitionSpec | None, stddev: float = 0.02
    ) -> nnx.Param[Array]:
        """Normally distributed; 0.02 is what CLIP, LLaMA and LLaVA start from."""
        make = jax.nn.initializers.normal(stddev)
        return nnx.Param(make(self.rngs.params(), shape, self.dtype, out_sharding=spec))

    def zeros(self, *shape: int, spec: PartitionSpec | None) -> nnx.Param[Array]:
        """A bias."""
        return nnx.Param(jnp.zeros(shape, self.dtype, out_sharding=spec))

    def ones(self, *shape: int, spec: PartitionSpec | None) -> nnx.Param[Array]:
        """The scale of a norm."""
        return nnx.Param(jnp.ones(shape, self.dtype, out_sharding=spec))


class Linear(nnx.Module):
    """x @ kernel + bias over one or several trailing axes: [..., *inputs] -> [..., *outputs]."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        init: Init,
        kernel: PartitionSpec | None,
        bias: PartitionSpec | None = None,
        use_bias: bool = True,
        lora: LoRAConfig | None = None,
        scheme: Scheme | None = None,
    ):
        self.contracted, self.spec = len(inputs), kernel
        self.kernel: nnx.Param[Array] | QuantizedKernel = (
            init.normal(*inputs, *outputs, spec=kernel)
            if scheme is None
            else QuantizedKernel(scheme, inputs, outputs, spec=kernel)
        )
        self.bias = init.zeros(*outputs, spec=bias) if use_bias else None
        self.lora = None if lora is None else _adapter(lora, inputs, outputs, kernel, init)

    def __call__(self, x: Float[Array, "..."], *, out: PartitionSpec | None) -> Float[Array, "..."]:
        """`out` is the partition spec of the result; it says which collective is meant."""
        if isinstance(self.kernel, QuantizedKernel):
            y = self.kernel.dot(x, out=out)
        else:
            kernel = all_gather_fsdp(self.kernel[...], self.spec)
            axes = tuple(range(x.ndim - self.contracted, x.ndim)), tuple(range(self.contracted))
            y = jax.lax.dot_general(x, kernel, (axes, ((), ())), out_sharding=out)
        if self.lora is not None:
            y = y + self.lora(x, out=out)
        return y if self.bias is None else y + self.bias[...]


def _adapter(
    config: LoRAConfig,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    kernel: PartitionSpec | None,
    init: Init,
) -> LoRA:
    return LoRA(
        config,
        inputs,
        outputs,
        kernel=kernel,
        inner=init.rules.tokens,
        key=init.rngs.params(),
        dtype=init.dtype,
    )


class MLP(nnx.Module):
    """Linear, activation, Linear: the tower's MLP, MBTF and the projector are of this form."""

    def __init__(self, inputs: int, width: int, outputs: int, *, init: Init):
        rules = init.rules
        self.rules = rules
        self.linear_1 = Linear(
            (inputs,), (width,), init=init, kernel=rules.column, bias=rules.column_bias
        )
        self.linear_2 = Linear((width,), (outputs,), init=init, kernel=rules.row, bias=rules.vector)

    def __call__(
        self, x: Float[Array, "B T _"], *, activation: Callable[[Array], Array]
    ) -> Float[Array, "B T _"]:
        """The hidden width is split over `tensor`, the result is not."""
        hidden = activation(self.linear_1(x, out=self.rules.hidden))
        return self.linear_2(hidden, out=self.rules.tokens)


class PackedAttention(nnx.Module):
    """Attention whose query, key and value projections are one weight, as `torch.nn` packs them.

    It is small enough to lie whole on every device. Who attends to what, a subclass says.
    """

    def __init__(self, width: int, heads: int, *, init: Init):
        self.rules = rules = init.rules
        parts = (3, heads, width // heads)
        self.kernel = init.normal(width, *parts, spec=rules.vector)
        self.bias = init.zeros(*parts, spec=rules.vector)
        self.output = Linear((width,), (width,), init=init, kernel=rules.vector, bias=rules.vector)

    def split(
        self,
        queries: Float[Array, "... C"],
        keys: Float[Array, "... C"],
        values: Float[Array, "... C"],
    ) -> tuple[Float[Array, "... N D"], Float[Array, "... N D"], Float[Array, "... N D"]]:
        """Projected, in heads."""
        query, key, value = (
            jnp.einsum("...c,cnd->...nd", x, self.kernel[...][:, part]) + self.bias[...][part]
            for part, x in enumerate((queries, keys, values))
        )
        return query, key, value

    def join(self, attended: Float[Array, "B K N D"]) -> Float[Array, "B K C"]:
        """The heads side by side, projected."""
        rows, tokens, heads, width = attended.shape
        joined = (rows, tokens, heads * width)
        attended = jax.lax.reshape(attended, joined, out_sharding=self.rules.tokens)
        return self.output(attended, out=self.rules.tokens)


class LayerNorm(nnx.Module):
    """Mean and variance over channels, in float32."""

    def __init__(self, width: int, *, epsilon: float, init: Init):
        self.epsilon = epsilon
        self.scale = init.ones(width, spec=init.rules.vector)
        self.bias = init.zeros(width, spec=init.rules.vector)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Normed, in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        centered = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centered).mean(-1, keepdims=True)
        normal = centered * jax.lax.rsqrt(variance + self.epsilon)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root mean square over channels, in float32, as LLaMA rounds it: before the scale."""

    def __init__(self, width: int, *, epsilon: float, init: Init):
        self.epsilon = epsilon
        self.scale = init.ones(width, spec=init.rules.vector)

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        """Normed, in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        square = jnp.square(wide).mean(-1, keepdims=True)
        return (wide * jax.lax.rsqrt(square + self.epsilon)).astype(x.dtype) * self.scale[...]


def barrier(x: Array) -> Array:
    """The same array, written to memory before anything is made of it, and so is its gradient.

    What goes into several matmuls is else computed again inside each of them, tile by tile, at the
    speed of a TPU's vector unit.
    """
    return jax.lax.optimization_barrier(x)


@jax.custom_vjp
def barrier_gradient(x: Array) -> Array:
    """The same array, of which only the gradient is written to memory."""
    return x


barrier_gradient.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def gelu(x: Array) -> Array:
    """The exact GELU, through the error function."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """The sigmoid GELU that OpenAI trained CLIP with."""
    return x * jax.nn.sigmoid(1.702 * x)


def stack(make: Callable[[Init], Layer], count: int, *, init: Init) -> Layer:
    """One module whose every parameter leads with a layer axis of `count`, for `jax.lax.scan`."""

    def one(key: Array) -> nnx.State:
        return nnx.state(make(dataclasses.replace(init, rngs=nnx.Rngs(key))))

    def abstract() -> Layer:
        return make(dataclasses.replace(init, rngs=nnx.Rngs(0)))

    keys = jax.random.split(init.rngs.params(), count)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(abstract)), jax.vmap(one)(keys))


def unstack(layers: Layer | nnx.List[Layer]) -> nnx.List[Layer]:
    """The layers of a stack one by one; a list stays as it is.

    Inference wants them so: a scan copies each layer's slice of the weights, which costs a decoding
    step more than its arithmetic does. Where nobody else holds the stack, its arrays are freed one
    after the other: memory holds a single one twice.
    """
    if isinstance(layers, nnx.List):
        return layers
    graph, state = nnx.split(layers)
    leaves, tree = jax.tree.flatten(state)
    del layers, state
    columns = []
    while leaves:
        leaf = leaves.pop(0)
        columns.append([leaf[i] for i in range(leaf.shape[0])])
        del leaf
    rows = zip(*columns, strict=True)
    return nnx.List([nnx.merge(graph, jax.tree.unflatten(tree, row)) for row in rows])


def split_layers(
    layers: Layer | nnx.List[Layer], sizes: Sequence[int]
) -> list[Layer | nnx.List[Layer]]:
    """Consecutive layers in groups of these sizes, which add up to all; stacks stay stacks."""
    starts = np.cumsum([0, *sizes]).tolist()
    if isinstance(layers, nnx.List):
        parts = itertools.pairwise(starts)
        return [nnx.List([layers[i] for i in range(start, stop)]) for start, stop in parts]
    graph, state = nnx.split(layers)
    leaves, tree = jax.tree.flatten(state)
    # One split, whose gradient is one concatenation.
    rows = [jax.lax.split(leaf, sizes) for leaf in leaves]
    return [nnx.merge(graph, jax.tree.unflatten(tree, part)) for part in zip(*rows, strict=True)]


def layer_at(layers: Layer | nnx.List[Layer], number: int) -> Layer:
    """One layer of a stack or a list."""
    if isinstance(layers, nnx.List):
        return layers[number]
    graph, state = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[number], state))


def apply_layers(
    step: Callable[[Carry, Layer], tuple[Carry, Kept]],
    carry: Carry,
    layers: Layer | nnx.List[Layer],
    *,
    remat: Remat = "none",
) -> tuple[Carry, list[Kept]]:
    """Runs `step` layer after layer, a scan over a stack or an unrolled loop over a list.

    Returns the last carry and what each step kept. What the backward pass needs of a layer is
    stored, or computed again, as `remat` says.
    """
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; choose one of {', '.join(REMAT)}")
    if isinstance(layers, nnx.List):
        kept = []
        for layer in layers:
            carry, keep = step(carry, layer)
            kept.append(keep)
        return carry, kept
    graph, state = nnx.split(layers)
    count = jax.tree.leaves(state)[0].shape[0]
    if not count:
        return carry, []

    def one(carry: Carry, layer: nnx.State) -> tuple[Carry, Kept]:
        return step(carry, nnx.merge(graph, layer))

    if remat != "none":
        # A scan is a barrier of its own: nothing of one layer's computation merges with another's.
        one = jax.checkpoint(one, policy=REMAT[remat], prevent_cse=False)
    carry, stacked = jax.lax.scan(one, carry, state)
    return carry, [jax.tree.map(lambda kept, i=i: kept[i], stacked) for i in range(count)]


def parameter_count(module: nnx.Module) -> int:
    """Parameters of a module, abstract or real."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
