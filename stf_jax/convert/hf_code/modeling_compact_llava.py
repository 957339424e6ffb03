"""LLaVA with few tokens an image, for `transformers` with `trust_remote_code=True`.

The tower, the language model, `generate` and attention are those of transformers' LLaVA; what lies
between tower and language model is here. Written by stf_jax, which trained the model; Apache-2.0.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaModel

from .configuration_compact_llava import CompactLlavaConfig


def windows(patches: torch.Tensor, side: int) -> torch.Tensor:
    """Patches in raster order as windows of side x side: [B, P, C] -> [B, K, C, side * side]."""
    batch, count, channels = patches.shape
    grid = math.isqrt(count)
    image = patches.transpose(1, 2).reshape(batch, channels, grid, grid)
    cut = functional.unfold(image, kernel_size=side, stride=side)
    return cut.transpose(1, 2).reshape(batch, -1, channels, side * side)


class CompactConnector(nn.Module):
    """Hidden states of the tower to tokens of the language model, as `config.compact` says.

    stf: hidden states are mixed by an MLP, if there are several, and each window of patches becomes
    one token with all of its channels (arXiv 2506.07138). average: the mean of a window. m3: the
    mean of projected tokens over windows (arXiv 2405.17430). random: named patches. llava: all.
    """

    def __init__(self, config: CompactLlavaConfig):
        super().__init__()
        self.compact = compact = config.compact
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.mm_projector = nn.Sequential(
            nn.Linear(compact["projector_inputs"], compact["projector_width"]),
            nn.GELU(),
            nn.Linear(compact["projector_width"], out),
        )
        mixer = compact.get("mbtf")
        if mixer is not None:
            layers = [
                nn.Linear(len(compact["taps"]) * width, mixer["mlp_width"]),
                nn.GELU(),
                nn.Linear(mixer["mlp_width"], width),
            ]
            if mixer["last_activation"]:
                layers.append(nn.GELU())
            self.mm_projector_crosslayer = nn.Sequential(*layers)

    def forward(self, taps: list[torch.Tensor]) -> torch.Tensor:
        """M x [B, P, C] -> [B, K, H]."""
        kind, compact = self.compact["kind"], self.compact
        mixed = taps[0]
        if compact.get("mbtf") is not None:
            mixed = self.mm_projector_crosslayer(torch.cat(taps, dim=-1))
        if kind == "random":
            mixed = mixed[:, compact["kept"]]
        elif kind == "stf":
            # The projector counts the channels of a window as (channel, row, column).
            mixed = windows(mixed, compact["window"]).flatten(2)
        elif kind == "average":
            mixed = windows(mixed, compact["window"]).mean(-1)
        tokens = self.mm_projector(mixed)
        if kind == "m3":
            side = math.isqrt(tokens.shape[1] // compact["tokens"])
            tokens = windows(tokens, side).mean(-1)
        return tokens


class CompactLlavaModel(LlavaModel):
    """Without the head."""

    config_class = CompactLlavaConfig

    def __init__(self, config: CompactLlavaConfig):
        super().__init__(config)
        self.multi_modal_projector = CompactConnector(config)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        """The tower's outputs; `pooler_output` is a list of [K, H], one an image."""
        outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
        taps = [outputs.hidden_states[tap][:, 1:] for tap in self.config.compact["taps"]]
        outputs.pooler_output = list(self.multi_modal_projector(taps))
        return outputs


class CompactLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """With the head, and `generate`."""

    config_class = CompactLlavaConfig

    def __init__(self, config: CompactLlavaConfig):
        super().__init__(config)
        self.model = CompactLlavaModel(config)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        """As the model's."""
        return self.model.get_image_features(pixel_values, **kwargs)
