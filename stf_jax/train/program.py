"""The compiled step of a config: what `train` runs, and what `plan` asks the compiler about."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.data.batch import Batch
from stf_jax.data.images import ImageProcessor
from stf_jax.models.llava import Llava
from stf_jax.models.quantization import is_quantized
from stf_jax.parallel.hosts import BatchLayout
from stf_jax.parallel.sharding import ShardingRules
from stf_jax.store.arrays import flatten
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.mesh import check_divisible
from stf_jax.train.config import TrainConfig
from stf_jax.train.features import check_cacheable, packed_shape
from stf_jax.train.optimizer import Parameters, make_optimizer, split_trained
from stf_jax.train.step import Loss, Step, TrainState, init_state, make_loss, make_step

# What each kind of device needs so that collectives run beside matmuls.
_OVERLAP = {
    "TPU v5 lite": {
        # By itself the compiler joins several sums (here those above 16 MiB stay alone) and waits.
        "xla_jf_crs_combiner_threshold_in_bytes": str(2**24),
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    },
    "TPU v6 lite": {
        # The SparseCore runs them.
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    },
}
# KiB of vector memory for a matmul, where the compiler takes 16 MiB. With few tokens those do, and
# more only hides less of the collectives.
_VECTOR_MEMORY = {"TPU v5 lite": 65536, "TPU v5": 49152, "TPU v6 lite": 98304}
_MANY_TOKENS = 4096


def compiler_options(device_kind: str, *, tokens: int) -> dict[str, str]:
    """Options of the compiler, which docs/tpu.md explains.

    Args:
        device_kind: as JAX names it.
        tokens: of a micro-batch, on one device.
    """
    options = dict(_OVERLAP.get(device_kind, {}))
    if tokens >= _MANY_TOKENS and device_kind in _VECTOR_MEMORY:
        options["xla_tpu_scoped_vmem_limit_kib"] = str(_VECTOR_MEMORY[device_kind])
    return options


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainProgram:
    """A training step and what goes into it; shapes, dtypes and shardings in place of arrays.

    Attributes:
        step: jitted.
        loss: of held-out examples, jitted.
        optimizer: that it updates with.
        state: what it changes.
        frozen: the parameters that it leaves alone.
        batch: [A, B, ...].
        layout: of the batch's rows on the mesh.
    """

    step: Step
    loss: Loss
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: Parameters
    batch: Batch
    layout: BatchLayout

    def compile(self, options: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """The step as an executable, which takes arrays of just these shapes and shardings.

        Args:
            options: of the compiler's, besides those that the chip asks for.
        """
        return self._compile(self.step, self.state, self.frozen, self.batch, options=options)

    def compile_loss(self) -> Any:
        """The loss as an executable, of the same shapes and shardings."""
        return self._compile(self.loss, self.state.parameters, self.frozen, self.batch, options={})

    def _compile(self, jitted: Any, *arguments: Any, options: Mapping[str, Any]) -> Any:
        packed = any(leaf.dtype == jnp.int4 for leaf in self.frozen.values())
        if packed and self._device.platform == "cpu":
            return _Jitted(jitted)
        return jitted.lower(*arguments).compile({**self._chip_options, **options})

    @property
    def _chip_options(self) -> dict[str, str]:
        tokens = self.layout.rows_per_device * self.batch.ids.shape[-1]
        return compiler_options(self._device.device_kind, tokens=tokens)

    @property
    def _device(self) -> Any:
        mesh = self.layout.mesh
        return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


class _Jitted:
    """In place of an executable, compiled at its first call.

    An executable refuses arrays of int4 on CPU, which do not say that they hold two values a byte
    (JAX 0.10); `jax.jit` does not ask them.
    """

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def memory_analysis(self) -> None:
        """Nothing is known of it yet."""


def make_program(
    config: TrainConfig,
    model: LlavaConfig,
    *,
    steps: int,
    mesh: Mesh | None,
    image_processor: ImageProcessor | None = None,
) -> TrainProgram:
    """The step of a config for a model, on a mesh that has been entered, or on one device.

    Args:
        config: of the run.
        model: that is trained.
        steps: of the whole run.
        mesh: None for one device.
        image_processor: of the vision tower; CLIP's by default.

    Raises:
        ValueError: the mesh does not divide the model or the batch, the model has fewer positions
            than a row, or its features cannot be cached.
    """
    if config.data.sequence_length > model.text.max_positions:
        raise ValueError(
            f"data.sequence_length {config.data.sequence_length} is more than the "
            f"{model.text.max_positions} positions of the language model"
        )
    if mesh is not None:
        check_divisible(model, mesh)
    layout = BatchLayout(mesh=mesh, rows=config.data.batch_size, micro_batches=config.micro_batches)
    rules = ShardingRules.none() if mesh is None else ShardingRules.default()
    lora = config.lora if config.stage == "lora" else None
    tower = config.data.features == "computed"
    if not tower:
        check_cacheable(model)
    network = Llava.abstract(model, rules=rules, lora=lora, training=True, tower=tower)
    # For a held-out loss: nothing is drawn at random.
    quiet = None if lora is None else dataclasses.replace(lora, dropout=0.0)
    noiseless = Llava.abstract(model, rules=rules, lora=quiet, tower=tower)
    normalize = (image_processor or ImageProcessor()).normalize
    parameters = flatten(nnx.to_pure_dict(nnx.state(network, nnx.Param)))
    trained, frozen = split_trained(parameters, config.stage)
    dtype = jnp.dtype(config.dtype)
    optimizer = make_optimizer(config.optimizer, steps=steps)
    step = make_step(
        network,
        optimizer,
        loss_normalization=config.normalization,
        remat=config.remat,
        dtype=dtype,
        seed=config.seed,
        normalize_pixels=normalize,
    )
    state = jax.eval_shape(lambda parameters: init_state(parameters, optimizer), trained)
    return TrainProgram(
        step=step,
        loss=make_loss(noiseless, dtype=dtype, normalize_pixels=normalize),
        optimizer=optimizer,
        state=jax.tree.map(lambda leaf: _on(leaf, leaf.dtype, mesh), state),
        frozen={
            path: _on(leaf, leaf.dtype if is_quantized(path) else dtype, mesh)
            for path, leaf in frozen.items()
        },
        batch=layout.like(_batch(config, model)),
        layout=layout,
    )


def _on(leaf: Any, dtype: Any, mesh: Mesh | None) -> Any:
    """A leaf on its devices; shapes that went through a trace know the abstract mesh only."""
    if mesh is None:
        return jax.ShapeDtypeStruct(leaf.shape, dtype)
    spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=NamedSharding(mesh, spec))


def _batch(config: TrainConfig, model: LlavaConfig) -> Batch:
    """One row, for its shapes."""
    text: Any = jax.ShapeDtypeStruct((1, config.data.sequence_length), jnp.int32)
    images, side = (1, config.data.images_per_row), model.image_size
    features: Any = None
    if config.data.features == "cached":
        side = 0
        features = jax.ShapeDtypeStruct((*images, *packed_shape(model)), jnp.dtype(config.dtype))
    pixels: Any = jax.ShapeDtypeStruct((*images, side, side, 3), jnp.uint8)
    questions: Any = None
    lengths: Any = None
    if model.question_length:
        questions = jax.ShapeDtypeStruct((*images, model.question_length), jnp.int32)
        lengths = jax.ShapeDtypeStruct(images, jnp.int32)
    clips: Any = None
    frames = config.data.clip_frames
    if frames and model.system.clip_layout(frames) is not None:
        shape_of_clips = (1, config.data.images_per_row // frames, frames)
        clips = jax.ShapeDtypeStruct(shape_of_clips, jnp.int32)
    return Batch(
        ids=text,
        labels=text,
        positions=text,
        segments=text,
        image_slots=text,
        pixels=pixels,
        features=features,
        questions=questions,
        question_lengths=lengths,
        clips=clips,
    )
