"""A run from its config to its last step. Mistakes are refused before the first step."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.pipeline import TrainingData, TrainingStep
from stf_jax.data.processors import Processors, read_processors
from stf_jax.models import flops
from stf_jax.models.layers import Init
from stf_jax.models.llava import Llava
from stf_jax.models.lora import is_adapter
from stf_jax.parallel.sharding import ShardingRules, make_mesh
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.store.checkpoint import NativeCheckpoint, extra_files
from stf_jax.store.run import CHECKPOINTS, CONFIG, FILES, FREE, LOCK, TENSORBOARD, open_model
from stf_jax.systems import named_config
from stf_jax.systems.base import LlavaConfig
from stf_jax.train.checkpoint import Checkpoints
from stf_jax.train.config import TrainConfig
from stf_jax.train.features import CachedFeatures
from stf_jax.train.interruption import Interruption
from stf_jax.train.metrics import MetricsLog, StepRecord
from stf_jax.train.optimizer import Parameters, schedule
from stf_jax.train.program import TrainProgram, make_program
from stf_jax.train.screen import first_screen
from stf_jax.train.step import Metrics, TrainState, init_state
from stf_jax.train.validation import sum_losses
from stf_jax.util.errors import explain_memory
from stf_jax.util.files import absolute, write_text

Ending = Literal["finished", "interrupted"]


class TrainingError(ValueError):
    """A run that cannot begin or continue; the message names the fix."""


def train(config: TrainConfig) -> Ending:
    """Begins a run, or continues the one in `config.out`.

    Everything that can be refused is, before the first step; a first checkpoint is written then,
    too. With several hosts, `distributed.start` comes before.

    Returns:
        "finished"; or "interrupted", by SIGTERM or Ctrl-C, with a checkpoint of the last step.

    Raises:
        ValueError: what cannot be, in one line or a list, and what to do.
    """
    config = _absolute(config)
    out = epath.Path(config.out)
    _check_out(out)
    first = open_model(config.model)
    _check_quantization(config, first)
    _check_architecture(config, first)
    files = extra_files(first.extras)
    processors = read_processors(first.extras / "hf", files, config=first.config)
    data = _open_data(config.data, processors)
    held_out = _open_held_out(config, processors)
    features = _open_features(config, first, data, held_out)
    steps = config.steps or data.num_steps(config.epochs)
    mesh = _mesh(config)
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        program = make_program(
            config,
            first.config,
            steps=steps,
            mesh=mesh,
            image_processor=processors.image_processor,
        )
        stack.enter_context(_alone(out))
        checkpoints = stack.enter_context(
            Checkpoints(
                out / CHECKPOINTS,
                config=config.to_dict() | {"begins_with": _fingerprint(first, data)},
                every=config.checkpoint.every,
                keep=config.checkpoint.keep,
                free=FREE,
                defaults=TrainConfig(model="", out="").to_dict(),
            )
        )
        start = checkpoints.latest or 0
        if start == steps:
            _say(f"{out} is finished: {steps} steps")
            return "finished"
        if jax.process_index() == 0:
            _write_config(config, out)
        state, frozen = _parameters(config, first, checkpoints, program)
        # A damaged checkpoint is set aside: the run may begin before it.
        start = checkpoints.latest or 0
        # While it is written the step is compiled; no step runs before a full disk is found out.
        checkpoints.save(start, state)
        with explain_memory(
            "a training step does not fit into the memory of a device; use more micro_batches, "
            "remat full, a larger mesh or fewer images_per_row"
        ):
            step = program.compile()
            loss = None if held_out is None else program.compile_loss()
        checkpoints.wait()
        _say(
            first_screen(
                config, first, data, held_out, features, program, step, steps=steps, start=start
            )
        )
        if features is not None and not features.compute(
            workers=config.data.workers, is_ended=interruption.has_come
        ):
            _say("interrupted while features were computed; start it again to continue")
            return "interrupted"
        log = stack.enter_context(
            contextlib.closing(
                MetricsLog(
                    out,
                    start=start,
                    stop=steps,
                    every=config.log_every,
                    flops=_flops(config, first.config) / jax.device_count(),
                    writes=jax.process_index() == 0,
                )
            )
        )
        run = _Run(
            config, data, held_out, program, step, loss, frozen, checkpoints, log, interruption
        )
        return run.go(state, start=start, stop=steps)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The parts of a run that stay the same from step to step."""

    config: TrainConfig
    data: TrainingData
    held_out: TrainingData | None
    program: TrainProgram
    step: Any
    loss: Any
    frozen: Parameters
    checkpoints: Checkpoints
    log: MetricsLog
    interruption: Interruption

    def go(self, state: TrainState, *, start: int, stop: int) -> Ending:
        """Runs the steps from `start` on, always one ahead of what it reports."""
        report = _Report(self.config, self.log, steps=stop)
        profile = self.config.profile or (-1, -1)
        rows = self.program.layout.local_rows
        batches = self.data.batches(start_step=start, stop_step=stop, rows=rows)
        with contextlib.closing(batches), contextlib.ExitStack() as tracing:
            for number in range(start, stop):
                requested = self.interruption.is_requested(number)
                if requested or not self.validate(number, state, report, stop=stop):
                    report.write()
                    self.checkpoints.save(number, state)
                    self.checkpoints.wait()
                    _say(f"interrupted after step {number}; start it again to continue")
                    return "interrupted"
                training_step = next(batches)
                placed = self.program.layout.place(training_step.batch)
                if number == profile[0]:
                    tracing.enter_context(jax.profiler.trace(_trace_directory(self.config)))
                state, metrics = self.step(state, self.frozen, placed)
                report.write()
                report.pending = training_step, metrics
                if number + 1 == profile[1]:
                    report.write()
                    tracing.close()
                if self.checkpoints.due(number + 1) or number + 1 == stop:
                    # A step that was not finite must not get into a checkpoint unseen.
                    report.write()
                    # Before the run counts as finished: a kill or a signal meanwhile repeats it.
                    if number + 1 == stop and not self.validate(stop, state, report, stop=stop):
                        _say("interrupted in the last validation; start it again to continue")
                        return "interrupted"
                    self.checkpoints.save(number + 1, state)
        self.checkpoints.wait()
        if self.data.lost:
            _say(f"left out, since they could not be read: {', '.join(self.data.lost)}")
        return "finished"

    def validate(self, number: int, state: TrainState, report: "_Report", *, stop: int) -> bool:
        """Records the loss of the held-out examples before step `number`, where that is due.

        It is a function of the state, so that a resumed run records the same. False if a signal
        ended it.
        """
        section = self.config.validation
        if self.held_out is None or section is None or (number % section.every and number < stop):
            return True
        report.write()
        result = sum_losses(
            self.loss,
            (state.parameters, self.frozen),
            self.held_out,
            layout=self.program.layout,
            batches=section.batches,
            is_ended=self.interruption.has_come,
        )
        if result is None:
            return False
        self.log.write_validation(number, result)
        report.restart_clock()
        return True


class _Report:
    """Reads a step's metrics from the device while the next step runs."""

    def __init__(self, config: TrainConfig, log: MetricsLog, *, steps: int):
        self.pending: tuple[TrainingStep, Metrics] | None = None
        self._config, self._log = config, log
        rate = config.optimizer.learning_rate
        if config.stage == "pretrain":
            other = config.optimizer.projector_learning_rate
            rate = rate if other is None else other
        rates = schedule(rate, steps=steps, warmup_ratio=config.optimizer.warmup_ratio)
        self._rates = np.asarray(jax.jit(rates)(jnp.arange(steps)))
        self._positions = config.data.batch_size * config.data.sequence_length
        self.restart_clock()

    def restart_clock(self) -> None:
        """What came before does not count as time of the next step."""
        self._last = time.perf_counter()

    def write(self) -> None:
        """Waits for the pending step and records it.

        Raises:
            TrainingError: its loss or gradient was not finite, and that stops the run.
        """
        if self.pending is None:
            return
        (training_step, metrics), self.pending = self.pending, None
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        record = StepRecord(
            step=training_step.step,
            loss=float(metrics.loss),
            grad_norm=float(metrics.grad_norm),
            learning_rate=float(self._rates[training_step.step]),
            supervised_tokens=int(metrics.supervised_tokens),
            fill=int(metrics.tokens) / self._positions,
            seconds=now - self._last,
        )
        self._last = now
        self._log.write(record)
        if not record.is_finite:
            self._refuse(training_step, record)

    def _refuse(self, training_step: TrainingStep, record: StepRecord) -> None:
        names = ", ".join(itertools.chain(*training_step.example_ids))
        what = (
            f"step {record.step}: the loss is {record.loss} and the gradient's norm "
            f"{record.grad_norm}, with the examples {names}"
        )
        if self._config.nonfinite == "stop":
            raise TrainingError(
                f"{what}; the checkpoints in {self._config.out} are from before. Look at the "
                "examples with 'stf-jax data show', or skip such steps: --nonfinite=skip"
            )
        _say(f"{what}; skipped")


@contextlib.contextmanager
def _alone(out: epath.Path) -> Iterator[None]:
    """Refuses a second run in the same directory; the lock ends with the process."""
    if "://" in os.fspath(out) or jax.process_index() > 0:
        yield
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        lock = (Path(out) / LOCK).open("a+")
    except OSError as error:
        raise TrainingError(
            f"{out} cannot be written to ({error.strerror}); choose another directory"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise TrainingError(
                f"{out}: another process trains there ({file.read().strip()}); let it end, or "
                "choose another directory"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _absolute(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths, which hold from any working directory."""
    datasets = tuple(
        dataclasses.replace(source, path=os.fspath(absolute(source.path)))
        for source in config.data.datasets
    )
    validation = config.validation and dataclasses.replace(
        config.validation, dataset=os.fspath(absolute(config.validation.dataset))
    )
    features = config.data.features_directory
    return dataclasses.replace(
        config,
        validation=validation,
        model=os.fspath(absolute(config.model)),
        out=os.fspath(absolute(config.out)),
        data=dataclasses.replace(
            config.data,
            datasets=datasets,
            features_directory=None if features is None else os.fspath(absolute(features)),
        ),
    )


def _open_data(config: DataConfig, processors: Processors) -> TrainingData:
    return TrainingData(
        config,
        tokenizer=processors.tokenizer,
        image_processor=processors.image_processor,
        tokens_per_image=processors.tokens_per_image,
        question_length=processors.question_length,
        layout=processors.clip_layout(config.clip_frames),
    )


def _open_held_out(config: TrainConfig, processors: Processors) -> TrainingData | None:
    """The held-out examples, packed whatever the training's rows are: their mean is the same."""
    if config.validation is None:
        return None
    source = DatasetSource(path=config.validation.dataset)
    held_out = dataclasses.replace(config.data, datasets=(source,), packing="packed")
    return _open_data(held_out, processors)


def _open_features(
    config: TrainConfig,
    first: NativeCheckpoint,
    data: TrainingData,
    held_out: TrainingData | None,
) -> CachedFeatures | None:
    """Has both read features, where the config says so; what is missing is computed later."""
    if config.data.features == "computed":
        return None
    parts = [data, *([] if held_out is None else [held_out])]
    directory = config.data.features_directory
    features = CachedFeatures.open(first, parts, dtype=config.dtype, directory=directory)
    for part in parts:
        features.attach(part)
    return features


def _check_out(out: epath.Path) -> None:
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; choose a directory for the run")
    strangers = [child.name for child in out.iterdir()] if out.exists() else []
    strangers = [name for name in strangers if name not in FILES and not name.startswith(".")]
    if strangers:
        raise TrainingError(
            f"{out} holds something else than a run ({sorted(strangers)[0]}); choose another "
            "directory"
        )


def _check_quantization(config: TrainConfig, first: NativeCheckpoint) -> None:
    scheme = first.config.text.quantization
    if first.adapters is not None:
        raise TrainingError(
            f"{config.model} is a LoRA run over {scheme} weights, which its adapters cannot be "
            f"merged into; train from stf-jax convert export {config.model} OUT --layout native "
            "--dequantize"
        )
    if scheme is not None and config.stage == "finetune":
        raise TrainingError(
            f"{config.model} has {scheme} weights, which stage finetune would have to change; "
            "choose --stage=lora, or name the model that it was made from"
        )


def _check_architecture(config: TrainConfig, first: NativeCheckpoint) -> None:
    if config.architecture is None:
        return
    wanted, actual = (
        flatten(dataclasses.asdict(sizes))
        for sizes in (
            named_config(config.architecture, quantization=config.quantization),
            first.config,
        )
    )
    # Padding of the vocabulary is the importer's choice.
    differences = [
        f"{path.replace('/', '.')}: {wanted[path]} there, {actual.get(path)} here"
        for path in wanted
        if wanted[path] != actual.get(path) and path != "text/vocab_padding"
    ]
    if differences:
        raise TrainingError(
            f"{config.model} is no {config.architecture}; name another model, or another "
            "architecture:\n" + "\n".join(f"  {line}" for line in differences)
        )


def _mesh(config: TrainConfig) -> Mesh | None:
    if config.mesh is not None:
        sizes = config.mesh.sizes(jax.device_count())
        return make_mesh(data=sizes["data"], fsdp=sizes["fsdp"], tensor=sizes["tensor"])
    if jax.process_count() > 1:
        raise TrainingError("several hosts need a mesh; leave out mesh: null")
    return None


def _fingerprint(first: NativeCheckpoint, data: TrainingData) -> dict[str, Any]:
    """Identifies the model and the examples, which a config only names."""
    return {"model": first.id, "examples": data.fingerprint}


def _write_config(config: TrainConfig, out: epath.Path) -> None:
    # YAML has no tuples.
    plain = json.loads(json.dumps(config.to_dict()))
    write_text(out / CONFIG, yaml.safe_dump(plain, sort_keys=False))


def _parameters(
    config: TrainConfig, first: NativeCheckpoint, checkpoints: Checkpoints, program: TrainProgram
) -> tuple[TrainState, Parameters]:
    """The state to continue from, and the parameters that stay; each host reads its own parts."""

    def read(like: Parameters) -> Parameters:
        return flatten(first.restore(unflatten(like))) if like else {}

    frozen = read(program.frozen)
    if checkpoints.latest is not None:
        restored = checkpoints.restore(program.state, report=_say)
        if restored is not None:
            return restored, frozen
    trained = program.state.parameters
    begun = read({path: leaf for path, leaf in trained.items() if not is_adapter(path)})
    if config.stage == "lora":
        begun |= _new_adapters(config, first.config, program)
    state = init_state({path: begun[path] for path in trained}, program.optimizer)
    # The step's number lies on every device, too.
    like = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    return jax.device_put(state, like), frozen


def _new_adapters(config: TrainConfig, model: LlavaConfig, program: TrainProgram) -> Parameters:
    rules = ShardingRules.none() if program.layout.mesh is None else ShardingRules.default()

    def make() -> Parameters:
        network = Llava(model, init=Init(rngs=nnx.Rngs(config.seed), rules=rules), lora=config.lora)
        leaves = flatten(nnx.to_pure_dict(nnx.state(network, nnx.Param)))
        return {path: leaf for path, leaf in leaves.items() if is_adapter(path)}

    # Compiled, nothing but the adapters is ever made.
    return jax.jit(make)()


def _flops(config: TrainConfig, model: LlavaConfig) -> float:
    data = config.data
    return flops.training(
        model,
        stage=config.stage,
        rows=data.batch_size,
        length=data.sequence_length,
        images=data.images_per_row,
        tower=data.features == "computed",
    ).total


def _trace_directory(config: TrainConfig) -> str:
    return os.fspath(epath.Path(config.out) / TENSORBOARD)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        sys.stderr.write(f"{text}\n")
