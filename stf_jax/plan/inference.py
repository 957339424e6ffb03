"""Compiles an engine's programs for chips that are not here, and estimates their cost.

Runs in a process of its own, see `stf_jax.plan.client`.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.config import InferenceConfig
from stf_jax.infer.engine import fit_room
from stf_jax.infer.lowering import LoweredEngine, abstract_program, lower
from stf_jax.infer.prompts import LEAST_QUESTION, Prompt, bucket, pad_prompts
from stf_jax.infer.slots import Suffixes
from stf_jax.models.quantization import bytes_per_value
from stf_jax.plan.chips import Topology
from stf_jax.plan.compiler import compile_and_read, mesh_of
from stf_jax.plan.estimate import estimate_cost
from stf_jax.plan.phases import InferencePlan, Phase
from stf_jax.plan.request import Request
from stf_jax.systems import named_config
from stf_jax.systems.base import LlavaConfig
from stf_jax.train.optimizer import LLAMA


def make_inference_plan(request: Request) -> InferencePlan:
    """Compiles prefill, insert and decode, one after the other, until one finds no room.

    Raises:
        ValueError: the topology, the mesh or the config is wrong, in one line.
    """
    config = InferenceConfig.load(request.config, request.overrides)
    topology = Topology.parse(request.topology)
    if config.architecture is None:
        raise ValueError(
            f"{request.config} has no architecture; add --architecture=llava_stf_7b, for instance"
        )
    model = named_config(config.architecture, quantization=config.quantization)
    chip = topology.chip
    mesh, work, dtype = mesh_of(config.mesh, topology), config.workload, config.dtype or "bfloat16"
    program = abstract_program(
        model, mesh=mesh, dtype=jnp.dtype(dtype), cache_dtype=config.cache_dtype
    )
    prompts = workload_prompts(model, config)
    longest = len(prompts[-1].ids) + work.max_new_tokens
    room = fit_room(
        model,
        prompts[-1:],
        slots=config.slots,
        new=work.max_new_tokens,
        multiple=program.row_multiple,
    )
    slots, rows = room.slots, room.rows
    # A system may prefill the question, too.
    splits = [model.system.split(prompt.ids) for prompt in prompts]
    rests = [len(prompt.ids) - split.start for prompt, split in zip(prompts, splits, strict=True)]
    lengths = sorted({bucket(rest, least=LEAST_QUESTION) for rest in rests})
    prefilled = splits[-1].prefilled
    lowered = lower(
        program,
        batch=pad_prompts(
            [prompts[-1].until(prefilled)],
            rows=rows,
            image_size=model.image_size,
            uniform=model.system.compacts,
        ),
        questions=[Suffixes.empty(rows, length, slots=slots) for length in lengths],
        room=room,
    )
    plan = InferencePlan(
        topology=str(topology),
        mesh=dict(mesh.shape),
        slots=slots,
        context=bucket(longest),
        new_tokens=work.max_new_tokens,
        images=work.images,
        dtype=dtype,
        cache_dtype=config.cache_dtype or dtype,
        limit=chip.memory,
        weights=bytes_of(lowered.parameters),
        cache=bytes_of(lowered.slots),
        prefixes=bytes_of(lowered.prefixes),
        phases=(),
    )
    inserts = zip(lengths, lowered.inserts, strict=True)
    for name, count, length, phase_program in (
        ("prefill", rows, bucket(prefilled), lowered.prefill),
        *(("insert", rows, *insert) for insert in inserts),
        ("decode", slots, 1, lowered.decode),
    ):
        reads = _reads(name, lowered, mesh) / chip.bandwidth
        phase = Phase(name=name, rows=count, length=length, needed=0, memory_seconds=reads)
        compiled = _compile(phase, phase_program, plan, topology)
        plan = dataclasses.replace(plan, phases=(*plan.phases, compiled))
        if not plan.fits:
            break
    return plan


def workload_prompts(model: LlavaConfig, config: InferenceConfig) -> list[Prompt]:
    """A prompt for each length of a question, the longest last.

    Raises:
        ValueError: it does not fit into the model.
    """
    work, tokens = config.workload, model.choose_budget(config.tokens)
    behind = [] if model.images_first is None else model.images_first.tokens(work.images)
    prefix = work.prompt_tokens + work.images * tokens + len(behind)
    longest = prefix + max(work.question_tokens) + work.max_new_tokens
    if longest > model.text.max_positions:
        raise ValueError(
            f"the workload makes {longest} positions; {config.architecture} has "
            f"{model.text.max_positions}; make it smaller"
        )
    return [
        _prompt(model, prefix, work.images, tokens, behind, question=question)
        for question in sorted(work.question_tokens)
    ]


def _compile(phase: Phase, lowered: Any, plan: InferencePlan, topology: Topology) -> Phase:
    """The phase with its cost; only with `needed` where the program does not fit."""
    start = time.perf_counter()
    compiled, text = compile_and_read(lowered.compile)
    if isinstance(compiled, int):
        return dataclasses.replace(phase, needed=max(compiled, plan.limit + 1))
    cost = estimate_cost(
        text, compiled.memory_analysis(), topology, one_iteration=phase.name == "decode"
    )
    # The engine holds weights, slots and prefixes all the time, arguments or not; old prefixes
    # until there are new ones.
    elsewhere = plan.weights + plan.cache + plan.prefixes - cost["arguments"]
    return dataclasses.replace(
        phase,
        needed=cost["peak"] + max(elsewhere, 0),
        compile_seconds=time.perf_counter() - start,
        **cost,
    )


def _prompt(
    model: LlavaConfig, prefix: int, images: int, tokens: int, behind: Sequence[int], question: int
) -> Prompt:
    """Text, images, and what the system wants behind them: `prefix` positions; then a question."""
    size = model.image_size
    ids = np.zeros(prefix + question, np.int32)
    end = prefix - len(behind)
    ids[end - images * tokens : end], ids[end:prefix] = IMAGE_TOKEN_ID, behind
    asked = np.zeros(model.question_length, np.int32) if model.question_length else None
    pixels = np.zeros((images, size, size, 3), np.float32)
    return Prompt(ids=ids, pixels=pixels, budget=tokens, question=asked)


def _reads(name: str, lowered: LoweredEngine, mesh: Mesh) -> float:
    """Bytes a chip that a program must at least move through HBM."""
    parameters = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(lowered.parameters)
    }
    # Of the embedding a few rows; what is split over `fsdp` is gathered first.
    tensor = mesh.shape["tensor"]
    weights = sum(
        leaf.size * bytes_per_value(leaf.dtype) / (tensor if "tensor" in leaf.sharding.spec else 1)
        for path, leaf in parameters.items()
        if "text/embedding" not in path and (name == "prefill" or path.startswith(LLAMA))
    )
    caches = {
        "prefill": bytes_of(lowered.prefixes),
        # Out of the prefixes and into the slots.
        "insert": 2 * bytes_of(lowered.prefixes),
        "decode": bytes_of(lowered.slots),
    }
    return weights + caches[name]


def bytes_of(tree: PyTree) -> int:
    """Bytes of an array that one chip holds."""
    return int(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * bytes_per_value(leaf.dtype)
            for leaf in jax.tree.leaves(tree)
        )
    )
