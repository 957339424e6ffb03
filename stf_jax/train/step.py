"""One step of training: loss and gradient over the micro-batches of a batch, then AdamW.

Trained parameters are float32 masters and are cast to the compute dtype inside the step; frozen
ones are stored in it, and have neither gradient nor optimizer state.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IGNORED_LABEL
from stf_jax.models.keys import StepKey
from stf_jax.models.layers import Remat
from stf_jax.models.llava import Llava
from stf_jax.models.quantization import is_quantized
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.train.optimizer import Parameters

LossNormalization = Literal["tokens", "micro_batches"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state that a step changes and a checkpoint holds."""

    step: Int[Array, ""]
    parameters: Parameters  # the trained ones, float32
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """Of one step: the loss before it, and the norm of the gradient before clipping.

    `tokens` are those of all examples in the batch, its padding not counted.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    supervised_tokens: Int[Array, ""]
    tokens: Int[Array, ""]


Step = Callable[[TrainState, Parameters, Batch], tuple[TrainState, Metrics]]
Loss = Callable[[Parameters, Parameters, Batch], tuple[Array, Array]]


def make_step(
    model: Llava,
    optimizer: optax.GradientTransformation,
    *,
    loss_normalization: LossNormalization = "tokens",
    remat: Remat = "none",
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    normalize_pixels: Callable[[Array], Array] = lambda pixels: pixels,
) -> Step:
    """The jitted step (state, frozen parameters, batch) -> (state, metrics); the state is donated.

    Every leaf of the batch leads with an axis of micro-batches, [A, B, ...], whose gradients are
    added up one after the other. Where the loss or the gradient is not finite, the step changes
    nothing but its own number and the schedule's.

    Args:
        model: abstract; gives the structure.
        optimizer: over the trained parameters.
        loss_normalization: "tokens" is the mean over all supervised tokens of the batch; with
            "micro_batches" every micro-batch counts alike, as in the PyTorch reference. One without
            supervised tokens counts as 0 there.
        remat: what the backward pass computes again rather than stores.
        dtype: of the forward and backward pass.
        seed: of dropout and noise, which follow from it and the step's number.
        normalize_pixels: makes the model's pixels of the batch's.
    """
    graph = nnx.graphdef(model)
    drawn = flatten(nnx.to_pure_dict(nnx.state(model, StepKey)))

    def step_keys(step: Array, micro_batch: Array) -> Parameters:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), micro_batch)
        return {
            path: jax.random.split(jax.random.fold_in(key, number), like.shape)
            for number, (path, like) in enumerate(sorted(drawn.items()))
        }

    def loss_of(
        trained: Parameters, frozen: Parameters, keys: Parameters, batch: Batch
    ) -> tuple[Array, Array]:
        leaves = cast_parameters({**trained, **frozen}, dtype) | keys
        batch = _normalize(batch, normalize_pixels)
        return nnx.merge(graph, unflatten(leaves)).loss(batch, remat=remat)

    def step(state: TrainState, frozen: Parameters, batch: Batch) -> tuple[TrainState, Metrics]:
        # Labels move by one: what stands first in a row is never predicted.
        supervised = (batch.labels[..., 1:] != IGNORED_LABEL).sum(axis=(1, 2))
        if loss_normalization == "tokens":
            weights = jnp.broadcast_to(1 / jnp.maximum(supervised.sum(), 1), supervised.shape)
        else:
            weights = 1 / (jnp.maximum(supervised, 1) * supervised.shape[0])

        def micro(
            carry: tuple[Array, Parameters], at: tuple[Batch, Array, Array]
        ) -> tuple[tuple[Array, Parameters], None]:
            (loss, gradient), (rows, weight, number) = carry, at
            keys = step_keys(state.step, number)

            def weigh(trained: Parameters) -> Array:
                return loss_of(trained, frozen, keys, rows)[0] * weight

            part, slope = jax.value_and_grad(weigh)(state.parameters)
            return (loss + part, jax.tree.map(jnp.add, gradient, slope)), None

        zero = jax.tree.map(jnp.zeros_like, state.parameters)
        parts = (batch, weights, jnp.arange(len(weights)))
        # A loop of one iteration would keep the compiler from seeing through it.
        alone = len(weights) == 1
        (loss, gradient), _ = jax.lax.scan(micro, (jnp.float32(0), zero), parts, unroll=alone)
        norm = optax.tree.norm(gradient)
        updates, moments = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        # The schedule continues all the same: its counts are the only integers.
        parameters, moments = jax.tree.map(
            lambda new, old: jnp.where(finite | jnp.issubdtype(new.dtype, jnp.integer), new, old),
            (parameters, moments),
            (state.parameters, state.optimizer),
        )
        metrics = Metrics(
            loss=loss,
            grad_norm=norm,
            supervised_tokens=supervised.sum(),
            tokens=(batch.segments > 0).sum(),
        )
        new = TrainState(step=state.step + 1, parameters=parameters, optimizer=moments)
        return new, metrics

    return jax.jit(step, donate_argnums=0)


def make_loss(
    model: Llava,
    *,
    dtype: DTypeLike = jnp.float32,
    normalize_pixels: Callable[[Array], Array] = lambda pixels: pixels,
) -> Loss:
    """The jitted (trained, frozen, batch [A, B, ...]) -> sum of the losses, supervised tokens.

    Args:
        model: abstract, without dropout; gives the structure.
        dtype: of the forward pass.
        normalize_pixels: makes the model's pixels of the batch's.
    """
    graph = nnx.graphdef(model)

    def loss(trained: Parameters, frozen: Parameters, batch: Batch) -> tuple[Array, Array]:
        leaves = cast_parameters({**trained, **frozen}, dtype)
        network = nnx.merge(graph, unflatten(leaves))

        def micro(carry: tuple[Array, Array], rows: Batch) -> tuple[tuple[Array, Array], None]:
            rows = _normalize(rows, normalize_pixels)
            total, count = network.loss(rows)
            return (carry[0] + total, carry[1] + count), None

        nothing = jnp.float32(0), jnp.int32(0)
        return jax.lax.scan(micro, nothing, batch, unroll=len(batch.ids) == 1)[0]

    return jax.jit(loss)


def _normalize(batch: Batch, normalize_pixels: Callable[[Array], Array]) -> Batch:
    """The batch with the model's pixels; with features there are none."""
    if batch.features is not None:
        return batch
    return dataclasses.replace(batch, pixels=normalize_pixels(batch.pixels))


def cast_parameters(parameters: Parameters, dtype: DTypeLike) -> Parameters:
    """In the dtype of a pass; integers and their scales stay what they are."""
    return {
        path: leaf if is_quantized(path) else leaf.astype(dtype)
        for path, leaf in parameters.items()
    }


def init_state(parameters: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0; moments lie where their parameters do."""
    return TrainState(
        step=jnp.int32(0),
        parameters=parameters,
        optimizer=jax.jit(optimizer.init)(parameters),
    )
