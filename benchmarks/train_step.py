"""Times a stage-2 training step beside `transformers`' LLaVA with AdamW: same weights and batch.

Everything but the tower trains, in float32 (or as --dtype says, ours over float32 masters), with
the gradient clipped, nothing recomputed. Contenders take turns, so that what else the machine does
falls on all of them alike; PyTorch's loss and ours are compared step by step.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from forward import IMAGE_ID, Task, build, convert_model, interleave, make_torch
from machine import print_ceilings
from options import make_parser

from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IGNORED_LABEL
from stf_jax.models.llava import Llava
from stf_jax.store.arrays import flatten
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.stf import STF, MBTFConfig
from stf_jax.train.optimizer import OptimizerConfig, make_optimizer, split_trained
from stf_jax.train.step import init_state, make_step

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, warmup_ratio=0.0)
# So long a cosine is a constant learning rate here.
STEPS = 10**6


def parse() -> argparse.Namespace:
    """The sizes and the repetitions."""
    parser = make_parser(__doc__, layers=4, width=1024, mlp_width=2752)
    parser.add_argument("--text", type=int, default=64, help="tokens beside the image's")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def make_batch(config: LlavaConfig, args: argparse.Namespace) -> Batch:
    """Rows of an image and then text, of which the second half is supervised."""
    rng = np.random.default_rng(0)
    tokens, size = config.tokens_per_image, config.vision.image_size
    length = tokens + args.text
    ids = np.zeros((args.rows, length), np.int32)
    ids[:, tokens:] = rng.integers(3, 31000, (args.rows, args.text))
    labels = np.full_like(ids, IGNORED_LABEL)
    labels[:, length - args.text // 2 :] = ids[:, length - args.text // 2 :]
    slots = np.full_like(ids, -1)
    slots[:, :tokens] = np.arange(tokens)
    fields: dict[str, Any] = {
        "ids": ids,
        "labels": labels,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape),
        "segments": np.ones_like(ids),
        "image_slots": slots,
        "pixels": rng.standard_normal((args.rows, 1, size, size, 3), np.float32),
    }
    return Batch(**fields)


class Ours:
    """The step of `stf-jax train`, one micro-batch."""

    def __init__(self, model: Llava, batch: Batch, *, dtype: str):
        leaves = flatten(nnx.to_pure_dict(nnx.state(model)))
        trained, frozen = split_trained(leaves, "finetune")
        optimizer = make_optimizer(OPTIMIZER, steps=STEPS)
        self._step = make_step(model, optimizer, dtype=jnp.dtype(dtype))
        self._frozen = frozen
        self._batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch)
        # Copies, since the step takes the arrays over.
        masters = {path: jnp.array(leaf, jnp.float32) for path, leaf in trained.items()}
        self._state = init_state(masters, optimizer)
        self.losses: list[float] = []

    def step(self, _: object = None) -> None:
        """One step, waited for."""
        self._state, metrics = self._step(self._state, self._frozen, self._batch)
        self.losses.append(float(metrics.loss))


class Theirs:
    """PyTorch, eager, with its fused attention and its fused AdamW."""

    def __init__(self, model: Any, batch: Batch):
        self._model = model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vision_tower" not in name)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=OPTIMIZER.learning_rate, weight_decay=0.0, fused=True
        )
        ids = np.where(batch.image_slots >= 0, IMAGE_ID, batch.ids)
        pixels = torch.tensor(np.asarray(batch.pixels)[:, 0].transpose(0, 3, 1, 2))
        device = model.device
        self._inputs = {
            "input_ids": torch.tensor(ids, dtype=torch.long, device=device),
            "labels": torch.tensor(np.asarray(batch.labels), dtype=torch.long, device=device),
            "pixel_values": pixels.to(device, model.dtype),
        }
        self.losses: list[float] = []

    def step(self, _: object = None) -> None:
        """One step, waited for."""
        loss = self._model(**self._inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(float(loss))


def main() -> None:
    """Builds, times, compares the losses, prints."""
    args = parse()
    print_ceilings(rows=args.rows * (576 + args.text), width=args.width, mlp_width=args.mlp_width)
    torch_model = make_torch(args)
    config, weights = convert_model(torch_model)
    if torch.cuda.is_available():
        torch_model = torch_model.cuda()
    taps = tuple(range(args.vision_layers - 1, 0, -1))
    width = args.vision_width
    stf = STF(taps=taps, mbtf=MBTFConfig(mlp_width=4 * width), projector_width=16 * width)
    configs = {576: config, 144: dataclasses.replace(config, system=stf)}
    batches = {k: make_batch(sizes, args) for k, sizes in configs.items()}
    ours = {
        k: Ours(build(sizes, weights, args.dtype), batches[k], dtype=args.dtype)
        for k, sizes in configs.items()
    }
    theirs = Theirs(torch_model, batches[576])
    tasks = {
        "torch 576": Task(theirs.step),
        "jax 576": Task(ours[576].step),
        "jax 144": Task(ours[144].step),
    }
    seconds = interleave(tasks, args.repeats)
    apart = np.abs(np.subtract(theirs.losses, ours[576].losses)) / np.abs(theirs.losses)
    first, last = theirs.losses[0], theirs.losses[-1]
    print(f"losses from {first:.4f} to {last:.4f}, at most {apart.max():.1e} apart (relative)")
    print(f"\n{'seconds a step':<32}{'least':>9}{'median':>9}{'most':>9}")
    for name, times in seconds.items():
        print(f"{name:<32}{min(times):9.2f}{statistics.median(times):9.2f}{max(times):9.2f}")
    print(f"\n{'ratio of':<32}{'least':>9}{'median':>9}")
    for text, above, below in (
        ("step, 576: PyTorch / ours", "torch 576", "jax 576"),
        ("step: our 576 / our 144", "jax 576", "jax 144"),
        ("step: PyTorch 576 / our 144", "torch 576", "jax 144"),
    ):
        least = min(seconds[above]) / min(seconds[below])
        middle = statistics.median(seconds[above]) / statistics.median(seconds[below])
        print(f"{text:<32}{least:9.2f}{middle:9.2f}")


if __name__ == "__main__":
    main()
