"""Prefill and decode of some systems as plain PyTorch computes them, for `systems.py --torch`.

Tower and language model are `transformers`' LLaVA; what a system does between them is written out
here, one image at a time, as the released codes do it. Weights are random. What acts inside the
language model is left out: there, released codes patch one release of transformers each.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.systems.average import Average
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.llava import Llava
from stf_jax.systems.m3 import M3
from stf_jax.systems.prumerge import PruMerge
from stf_jax.systems.quecc import QueCC
from stf_jax.systems.stf import STF

# Hidden states of the tower, each [1, P + 1, C]; ids of the question -> tokens [1, K, H].
Connect = Callable[[tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]


def connector_of(model: Any, config: LlavaConfig, budget: int) -> Connect | None:
    """What lies between tower and language model; None for systems that are not written here."""
    system, vision, text = config.system, config.vision, config.text
    llava = model.model
    project = llava.multi_modal_projector
    if isinstance(system, Average):
        return lambda states, _: project(pool(states[-2][:, 1:], system.window))
    if isinstance(system, STF):
        if system.mbtf is not None:
            return None
        width = system.window**2 * vision.width
        wide = _mlp(width, system.projector_width, text.width)
        return lambda states, _: wide(windows(states[-2][:, 1:], system.window).flatten(2))
    if isinstance(system, M3):
        window = round((vision.patches / budget) ** 0.5)
        return lambda states, _: pool(project(states[-2][:, 1:]), window)
    if isinstance(system, PruMerge):
        layer = llava.vision_tower.encoder.layers[-1]
        return lambda states, _: project(merge(states[-2], layer, system))
    if isinstance(system, QueCC):
        quecc = QuestionWindows(system, vision, text)

        def connect(states: tuple[torch.Tensor, ...], question: torch.Tensor) -> torch.Tensor:
            hidden = llava.language_model(question, use_cache=False).last_hidden_state
            return quecc([states[tap][:, 1:] for tap in system.taps], hidden[:, -1])

        return connect
    return (lambda states, _: project(states[-2][:, 1:])) if type(system) is Llava else None


def windows(x: torch.Tensor, side: int) -> torch.Tensor:
    """[1, P, C] -> [1, K, side * side, C]: the patches of each window."""
    grid, channels = round(x.shape[1] ** 0.5), x.shape[2]
    count = grid // side
    cut = x.view(count, side, count, side, channels).transpose(1, 2)
    return cut.reshape(1, count**2, side**2, channels)


def pool(x: torch.Tensor, side: int) -> torch.Tensor:
    """The mean over each window."""
    return x if side == 1 else windows(x, side).mean(dim=2)


def merge(x: torch.Tensor, layer: Any, system: PruMerge) -> torch.Tensor:
    """PruMerge and PruMerge+ with a fixed share: [1, P + 1, C] -> [1, K + 1, C]."""
    ratio = system.ratio
    assert ratio is not None
    normed = layer.layer_norm1(x)
    query, key = (
        project(normed)[0] for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    x, keys, width = x[0, 1:], key[1:], x.shape[2]
    scores = torch.softmax(query[:1] @ key.T / width**0.5, dim=-1)[0, 1:]
    kept = scores.topk(int(len(x) * ratio)).indices
    if system.plus:
        step = int(1 / ratio)
        kept = torch.cat([kept, torch.arange(step // 2, len(x) - 1, step)])
    dropped = torch.ones(len(x), dtype=torch.bool)
    dropped[kept] = False
    # As many of the first dropped ones are forgotten as there are repeats.
    rest = dropped.nonzero()[:, 0][len(kept) - int((~dropped).sum()) :]
    candidates = torch.cat([kept, rest])
    units = nn.functional.normalize(keys, dim=-1)
    likeness = units[kept] @ units[candidates].T
    likeness.fill_diagonal_(-torch.inf)
    nearest = candidates[likeness.topk(system.neighbors).indices]
    merged = x[kept] + (scores[nearest][..., None] * x[nearest]).sum(dim=1)
    extra = (scores[rest][:, None] * x[rest]).sum(dim=0, keepdim=True)
    return torch.cat([merged, extra])[None]


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class QuestionWindows(nn.Module):
    """QueCC's compressor and projector."""

    def __init__(self, system: QueCC, vision: VisionConfig, text: TextConfig):
        super().__init__()
        width, self.side = vision.width, system.stride

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(width, eps=1e-6)

        def normed(inputs: int) -> nn.Sequential:
            return nn.Sequential(_mlp(inputs, width, width), norm())

        self.text = nn.Sequential(nn.Linear(text.width, width), norm())
        self.query = normed(width)
        self.key, self.value = (normed(len(system.taps) * width) for _ in range(2))
        self.window = nn.Conv2d(width, width, self.side, stride=self.side, groups=width)
        self.attention = nn.MultiheadAttention(width, system.heads, batch_first=True)
        self.projector = _mlp(width, system.projector_width, text.width)

    def forward(self, taps: list[torch.Tensor], question: torch.Tensor) -> torch.Tensor:
        """[1, P, C] each, [1, H] -> [1, K, H]."""
        query = self.query(taps[-1] + self.text(question)[:, None])
        side = round(query.shape[1] ** 0.5)
        query = self.window(query.transpose(1, 2).unflatten(2, (side, side)))
        blocks = torch.cat(taps, dim=-1)
        key, value = (windows(part(blocks), self.side)[0] for part in (self.key, self.value))
        query = query.flatten(2)[0].T[:, None]
        attended = self.attention(query, key, value, need_weights=False)[0]
        return self.projector(attended.transpose(0, 1))


class Upstream:
    """One system at one budget and batch size 1.

    Args:
        model: `transformers`' LLaVA.
        connect: what lies between its tower and its language model.
        ids: of the prompt, without the image's tokens.
        at: where they stand.
        question: ids that the image is asked.
        new: tokens to decode.
    """

    def __init__(
        self, model: Any, connect: Connect, ids: np.ndarray, at: int, question: np.ndarray, new: int
    ):
        self._model, self._connect, self._at, self._new = model, connect, at, new
        self._ids, self._question = (
            torch.tensor(part[None].astype(np.int64)) for part in (ids, question)
        )
        size = model.config.vision_config.image_size
        self._pixels = torch.randn(1, 3, size, size).to(model.dtype)

    @torch.inference_mode()
    def prefill(self) -> Any:
        """Image and text in, logits of the next token and the cache out."""
        llava = self._model.model
        states = llava.vision_tower(self._pixels, output_hidden_states=True).hidden_states
        tokens = self._connect(states, self._question)
        embeds = llava.language_model.embed_tokens(self._ids)
        parts = [embeds[:, : self._at], tokens, embeds[:, self._at :]]
        return self._step(inputs_embeds=torch.cat(parts, dim=1))

    @torch.inference_mode()
    def decode(self, prefilled: Any) -> Any:
        """The tokens after the first."""
        logits, cache = prefilled
        for _ in range(self._new):
            token = logits.argmax(-1, keepdim=True)
            logits, cache = self._step(input_ids=token, past_key_values=cache)
        return logits

    def _step(self, **inputs: Any) -> tuple[Any, Any]:
        out = self._model(**inputs, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values
