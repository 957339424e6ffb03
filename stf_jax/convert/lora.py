"""LoRA adapters: PEFT's directories, and LLaVA's, over the model that they were trained on.

    adapter_config.json                 rank, alpha and what else PEFT noted
    adapter_model.safetensors or .bin   A [R, C] and B [F, R] of each adapted weight [F, C]
    non_lora_trainables.bin             LLaVA: what was trained as a whole, such as the projector
    config.json                         LLaVA: of the whole model

An adapted weight is W + scale B A (Hu et al. 2021, arXiv 2106.09685), where scale is alpha / R, or
alpha / sqrt(R) with "use_rslora" (arXiv 2312.03732).
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from stf_jax.convert.dtypes import FLOATS, Array, is_float
from stf_jax.convert.foreign import refuse_tensors
from stf_jax.convert.layouts import PEFT, Layout, canonical, published_name, recognize, unwrap
from stf_jax.convert.parts import Part, Tensor, open_part
from stf_jax.convert.readers import BESIDE_LORA, LORA_CONFIG, open_file, read_json
from stf_jax.convert.safetensors_file import TensorInfo
from stf_jax.models.lora import low_rank
from stf_jax.models.weights import transpose
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import list_some

# "model.layers.0.self_attn.q_proj.lora_A.weight"; the adapter's name may stand behind the A.
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!bias$)\w+)?(?:\.weight)?")
# In the names of what PEFT saves as a whole.
_WHOLE = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")

# Settings of PEFT that make something else of a weight than W + scale B A; unset they are absent,
# null, false or empty.
_CHANGES = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "transposed weights",
    "layer_replication": "layers that are there twice",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "tokens that switch it on",
    "trainable_token_indices": "single rows of the embedding",
    "arrow_config": "Arrow",
    "use_bdlora": "BD-LoRA",
}
# How A and B may begin; all others change the weight that they are added to, too.
_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")

_MERGE_FIRST = "merge it with merge_and_unload of PEFT, and import the whole model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
    """What is added to one weight [F, C]: scale B A; to an embedding [V, C]: its transpose."""

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        outer, inner = self.b.info.shape[:1], self.a.info.shape[1:]
        return (*inner, *outer) if self.embedding else (*outer, *inner)

    def read(self) -> Array:
        """What is to be added, float32."""
        # As a run merges its own adapters, A [C, R] times B [R, F]: the sums are equal to the bit.
        product = low_rank(transpose(self.a.read()), transpose(self.b.read()), scale=self.scale)
        return product if self.embedding else transpose(product)


@dataclasses.dataclass(frozen=True)
class AdaptedTensors:
    """Weights with a LoRA adapter in them, by canonical name."""

    base: Mapping[str, Tensor]
    added: Mapping[str, LowRank]

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shapes and dtypes are the base's."""
        return {name: self.base[name].info for name in self.added}

    def read(self, name: str) -> Array:
        """One weight in float32: what it is cast to is for the reader, so that it is cast once."""
        weight = self.added[name].read()
        weight += self.base[name].read()
        return weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """What adapter_config.json says of the sizes."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]  # of modules whose names end so
    alphas: Mapping[str, float]
    stabilized: bool  # scale is alpha / sqrt(rank)

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in the model."""
        return _look_up(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank_of(module)
        alpha = _look_up(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.stabilized else alpha / rank


def merge_lora(part: Part, base: epath.PathLike | None) -> tuple[Part, Part]:
    """The model of a LoRA adapter: the base's weights, adapted, and what was trained as a whole.

    Args:
        part: an adapter's directory, opened.
        base: the model that it was trained on: a language model, or a LLaVA.

    Returns:
        The model, as if it had been read from the adapter's directory; and its base.

    Raises:
        CheckpointError: no base, one that does not fit, or an adapter that is more than LoRA.
    """
    path = part.path
    if path.is_file():
        raise CheckpointError(
            f"{path} is a part of a LoRA adapter; name the directory that holds it: {path.parent}"
        )
    settings, named = _read_settings(path)
    if base is None:
        raise CheckpointError(
            f"{path} is a LoRA adapter alone; import it together with the model that it was "
            f"trained on{named}: stf-jax convert import {path} OUT --base DIR --vision-tower CLIP"
        )
    under = open_part(base)
    if not under.language:
        raise CheckpointError(f"{base} is no language model, but {under.layout}")
    low_rank_tensors, whole = _read_tensors(part)
    if any("lora_magnitude" in name for name in whole):
        raise CheckpointError(_refusal(path, _CHANGES["use_dora"]))
    spelling = _spelling([*whole, *(module for module, _ in low_rank_tensors)])
    tensors, unknown = dict(under.tensors), list(under.unknown)
    for name, tensor in whole.items():
        ours = canonical(name, spelling)
        if ours is None:
            unknown.append(tensor.name)
        else:
            tensors[ours] = tensor
    added, problems = _place(low_rank_tensors, settings, tensors, spelling)
    if problems:
        raise CheckpointError(f"{path} does not fit {base}:\n{list_some(problems)}")
    adapted = AdaptedTensors(dict(tensors), added)
    tensors |= {name: Tensor(adapted, name) for name in added}
    layout = recognize(published_name(name, "llava") for name in tensors)
    if layout == "llama" and str(part.hf.get("model_type", "")).startswith("llava"):
        raise CheckpointError(
            f"{path} was trained with images, but there is no {BESIDE_LORA} with its projector; "
            "download or copy it, too"
        )
    if under.layout == "hf" and not part.hf:
        layout = under.layout
    assert layout is not None
    merged = Part(
        path=path,
        layout=layout,
        hf=part.hf or under.hf,
        tensors=tensors,
        unknown=tuple(unknown),
    )
    return merged, under


def _read_settings(path: epath.Path) -> tuple[LoRASettings, str]:
    """What adapter_config.json says, and how it names the base, for an error."""
    file = path / LORA_CONFIG
    if not file.exists():
        raise CheckpointError(
            f"{path} has no {LORA_CONFIG}, which holds the adapter's alpha; download or copy it"
        )
    hf = read_json(file)
    _refuse_more_than_lora(path, hf)
    rank, ranks = _read_sizes(file, hf, "r", "rank_pattern", whole=True)
    alpha, alphas = _read_sizes(file, hf, "lora_alpha", "alpha_pattern", whole=False)
    settings = LoRASettings(
        rank=rank, alpha=alpha, ranks=ranks, alphas=alphas, stabilized=bool(hf.get("use_rslora"))
    )
    name = hf.get("base_model_name_or_path")
    return settings, f" ({LORA_CONFIG} names {name})" if name and isinstance(name, str) else ""


def _refuse_more_than_lora(path: epath.Path, hf: Mapping[str, Any]) -> None:
    kind, beginning = hf.get("peft_type", "LORA"), hf.get("init_lora_weights")
    if kind != "LORA":
        raise CheckpointError(_refusal(path, str(kind)))
    for key, what in _CHANGES.items():
        if hf.get(key):
            raise CheckpointError(_refusal(path, what))
    if beginning not in _BEGINNINGS:
        raise CheckpointError(_refusal(path, f"init_lora_weights {beginning!r}"))


def _read_sizes(
    file: epath.Path, hf: Mapping[str, Any], key: str, patterns: str, *, whole: bool
) -> tuple[Any, Mapping[str, Any]]:
    """A number for every module, and those of single ones by how their names end."""
    singles = hf.get(patterns) or {}
    if not isinstance(singles, Mapping):
        raise CheckpointError(f"{file}: {patterns} is {singles!r}; give an object, {{...}}")
    for pattern in singles:
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise CheckpointError(
                f"{file}: {patterns} has {pattern!r}, a regular expression, which stf_jax does not "
                "read; write the names of modules in full"
            )
    numbers = {key: hf.get(key), **{f"{patterns}.{name}": n for name, n in singles.items()}}
    for name, number in numbers.items():
        if whole and (type(number) is not int or number < 1):
            raise CheckpointError(f"{file}: {name} is {number!r}; give a whole number, 1 or more")
        if type(number) not in (int, float) or not abs(number) < 1e30:
            raise CheckpointError(f"{file}: {name} is {number!r}; give a number, and a finite one")
    return hf[key], singles


def _refusal(path: epath.Path, what: str) -> str:
    return f"{path} is an adapter with {what}, which stf_jax does not merge; {_MERGE_FIRST}"


def _look_up(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """As PEFT does: the first pattern that names the module, or the end of its name."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if module == name or (name == pattern and module.endswith(f".{name}")):
            return value
    return default


_Halves = dict[tuple[str, bool], dict[str, Tensor]]


def _read_tensors(part: Part) -> tuple[_Halves, dict[str, Tensor]]:
    """A and B by module and whether it is an embedding, and what is saved as a whole by name."""
    tensors = list(part.tensors.values())
    beside = part.path / BESIDE_LORA
    if beside.exists():
        file = open_file(beside)
        refuse_tensors(beside, file.infos, {})
        tensors += [Tensor(file, name) for name in file.infos]
    halves: _Halves = {}
    whole: dict[str, Tensor] = {}
    for tensor in tensors:
        name = unwrap(tensor.name).removeprefix(PEFT)
        if match := _LORA.fullmatch(name):
            module, embedding, which = match.groups()
            halves.setdefault((module, bool(embedding)), {})[which] = tensor
        else:
            whole[_WHOLE.sub("", name)] = tensor
    return halves, whole


def _place(
    halves: _Halves, settings: LoRASettings, base: Mapping[str, Tensor], spelling: Layout
) -> tuple[dict[str, LowRank], list[str]]:
    """What is added to each of the base's weights, by canonical name, and what does not fit."""
    added: dict[str, LowRank] = {}
    problems: list[str] = []
    for (module, embedding), pair in halves.items():
        if pair.keys() != {"A", "B"}:
            problems.append(f"missing: one of lora_A and lora_B of {module}")
            continue
        name = canonical(f"{module}.weight", spelling)
        if name is None or name not in base:
            problems.append(f"missing in the base: {module}.weight")
            continue
        a, b, rank = pair["A"], pair["B"], settings.rank_of(module)
        infos = f"A {a.info.shape} {a.info.dtype} and B {b.info.shape} {b.info.dtype} of {module}"
        if a.info.shape[:1] != (rank,) or b.info.shape[1:] != (rank,):
            problems.append(f"{infos}: {LORA_CONFIG} says rank {rank}")
            continue
        update = LowRank(a=a, b=b, scale=settings.scale_of(module), embedding=embedding)
        if update.shape != base[name].info.shape:
            problems.append(f"{infos}: the base's weight is {base[name].info.shape}")
        elif not (is_float(a.info.dtype) and is_float(b.info.dtype)):
            problems.append(f"{infos}: expected {', '.join(FLOATS)}")
        else:
            added[name] = update
    return added, problems


def _spelling(names: Iterable[str]) -> Layout:
    """How the adapted model spells its names: that of transformers' Llava has other ones."""
    parts = ("language_model.", "multi_modal_projector.")
    return "hf" if any(part in name for name in names for part in parts) else "llava"
