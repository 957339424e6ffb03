"""`search`: a schedule for a model, from its weights and a dataset."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import yaml
from etils import epath
from flax import nnx

from stf_jax.convert.stored_model import StoredModel, open_any
from stf_jax.infer.load import DTypeName
from stf_jax.models.llava import Llava
from stf_jax.search.algorithms import (
    Counts,
    Progress,
    Quality,
    Rule,
    Sigmoid,
    fit_sigmoid,
    search_greedily,
    search_sigmoids,
)
from stf_jax.search.calibration import Calibration, read_prompts
from stf_jax.search.journal import Journal
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.gsearch import GSearch, solve_midpoint
from stf_jax.systems.llava import Llava as Plain
from stf_jax.systems.pruning import PruningSystem
from stf_jax.util.errors import explain_memory
from stf_jax.util.files import write_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a search has found.

    Attributes:
        counts: tokens of an image in each layer.
        quality: with them.
        dense: with all tokens.
        sigmoid: that the counts follow, or that is nearest to them.
        fitted: whether it is the nearest.
        how: the search, in words.
        measured: schedules that were measured for it.
    """

    counts: Counts
    quality: Quality
    dense: Quality
    sigmoid: Sigmoid
    fitted: bool
    how: str
    measured: int

    @property
    def share(self) -> float:
        """The mean over layers of the tokens that stay."""
        return sum(self.counts) / (self.counts[0] * len(self.counts))

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of the tokens on average; {self.quality.agreement:.1%} of the "
            f"next tokens as with all; cross entropy {self.quality.cross_entropy:.4f}, with all "
            f"{self.dense.cross_entropy:.4f}"
        )

    def to_yaml(self) -> str:
        """A file for `--field schedule=@FILE`."""
        content = {
            "schedule": list(self.counts),
            "search": self.how,
            "share": round(self.share, 6),
            "agreement": self.quality.agreement,
            "cross_entropy": self.quality.cross_entropy,
            "cross_entropy_dense": self.dense.cross_entropy,
            "sigmoid": {**dataclasses.asdict(self.sigmoid), "fitted": self.fitted},
        }
        head = "# For --system gsearch --field schedule=@THIS_FILE\n"
        text: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
        return head + text


def search(
    path: epath.PathLike,
    calibration: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    budget: float | None = None,
    rule: Rule | None = None,
    samples: int = 64,
    rows: int = 8,
    template: str = "v1",
    dtype: DTypeName | None = None,
    vision_tower: epath.PathLike | None = None,
    progress: Progress = lambda done, total: None,
) -> Schedule:
    """Searches how many tokens each layer needs, and writes it to a file.

    What is measured is kept in a journal beside the file; the same call continues after a kill, and
    another search of the same model and prompts uses what is known. `rows` may differ.

    Args:
        path: a LLaVA-1.5, as for `stf_jax.load`.
        calibration: folder made by `stf-jax data build`; what its prompts need is what is kept.
        out: YAML file for the schedule.
        budget: mean share of the tokens that stay, for P-Sigmoid; None is G-Search.
        rule: of G-Search; by default its own.
        samples: calibration prompts.
        rows: prompts at a time.
        template: of the prompts.
        dtype: of weights and arithmetic; by default float32 on CPU and bfloat16 elsewhere.
        vision_tower: a directory with CLIP, for a PyTorch directory that does not lead to one.
        progress: told how much of the search is done.

    Raises:
        ValueError: a model that is no LLaVA-1.5, no calibration prompts, a budget that cannot be,
            or a journal of another search.
    """
    out, rule = Path(out), rule or Rule()
    if rows < 1:
        raise ValueError(f"rows is {rows}; give 1 or more")
    opened = open_any(path, vision_tower=vision_tower)
    config = _pruning_config(opened)
    if budget is not None:
        # Refuses a budget that cannot be before anything is computed.
        solve_midpoint(1.0, budget, layers=config.text.layers)
    prompts = read_prompts(calibration, opened.processors(), template=template, samples=samples)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    network = Llava.abstract(config, dtype=jnp.dtype(dtype), lora=opened.adapters)
    with explain_memory("the model does not fit into the memory of the device; give fewer --rows"):
        nnx.update(network, opened.restore(nnx.to_pure_dict(nnx.state(network))))
        measure = Calibration(network, prompts, rows=min(rows, len(prompts)))
        out.parent.mkdir(parents=True, exist_ok=True)
        with Journal(
            journal_path(out), fingerprint=measure.fingerprint, measure=measure
        ) as evaluate:
            sizes = {"tokens": measure.tokens, "layers": measure.layers}
            if budget is None:
                counts, _ = search_greedily(evaluate, rule=rule, progress=progress, **sizes)
                sigmoid = fit_sigmoid(counts)[0]
                limit = {
                    "agree": "",
                    "ce": f", tolerance {rule.tolerance}",
                    "lambda": f", weight {rule.weight}",
                }
                how = f"G-Search, {rule.criterion}{limit[rule.criterion]}, step {rule.step}"
            else:
                counts, sigmoid = search_sigmoids(
                    evaluate, budget=budget, progress=progress, **sizes
                )
                how = f"P-Sigmoid, budget {budget}"
            found = Schedule(
                counts=counts,
                quality=evaluate(counts),
                dense=measure.dense,
                sigmoid=sigmoid,
                fitted=budget is None,
                how=how,
                measured=evaluate.measured,
            )
    write_text(out, found.to_yaml())
    return found


def journal_path(out: Path) -> Path:
    """Beside the schedule."""
    return out.with_name(f"{out.name}.journal.jsonl")


def _pruning_config(opened: StoredModel) -> LlavaConfig:
    """The model with a decoder that can drop tokens; its weights are LLaVA-1.5's."""
    config, system = opened.config, opened.config.system
    if not isinstance(system, Plain | PruningSystem):
        raise ValueError(
            f"{opened.path} is a model of {system.title}; a schedule is for LLaVA-1.5, which shows "
            "the language model every patch"
        )
    if config.text.layers < 3:
        raise ValueError(f"{opened.path} has {config.text.layers} layers, of which none can drop")
    searched = GSearch(
        taps=system.taps,
        projector_width=system.projector_width,
        schedule=(system.tokens(config.vision),) * config.text.layers,
    )
    return dataclasses.replace(config, system=searched)
