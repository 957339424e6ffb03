"""LLaVA with few tokens an image, for `transformers` with `trust_remote_code=True`.

The tower, the language model, `generate` and attention are those of transformers' LLaVA. What lies
between tower and language model is in `connector_compact_llava.py`, one file for each paper.
Written by stf_jax, which trained the model; Apache-2.0.
"""

import torch
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from .base_compact_llava import read_tower
from .configuration_compact_llava import CompactLlavaConfig
from .connector_compact_llava import CompactConnector


class CompactLlavaModel(LlavaModel):
    """Without the head."""

    config_class = CompactLlavaConfig

    def __init__(self, config: CompactLlavaConfig):
        super().__init__(config)
        self.multi_modal_projector = CompactConnector(config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """Tokens of N images: `pooler_output` is a list of [K, H], `hidden_states` are the taps.

        Args:
            pixel_values: [N, 3, height, width].
            question_input_ids: what each image is asked, [N, Q], padded on the right, from the
                processor; for connectors that read it.
            question_attention_mask: [N, Q], 0 where there is padding.
            kwargs: what transformers passes to other models; nothing is read.
        """
        compact, connector = self.config.compact, self.multi_modal_projector
        question = None
        if connector.reads_question:
            question = self.read_questions(question_input_ids, question_attention_mask)
        features = read_tower(
            self.vision_tower,
            pixel_values,
            compact["taps"],
            interpolate=compact["image_size"] != self.config.vision_config.image_size,
            extra=connector.extra_tokens(),
            reads_class=connector.reads_class,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=features.taps[0],
            pooler_output=list(connector(features, question)),
            hidden_states=tuple(features.taps),
        )

    @torch.no_grad()
    def read_questions(self, ids: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        """The last hidden state of each question, which the language model reads alone: [N, H]."""
        if ids is None or mask is None:
            raise ValueError(
                "this model reads what an image is asked; give question_input_ids and "
                "question_attention_mask, as its processor makes them from text and images"
            )
        read = self.language_model(input_ids=ids, attention_mask=mask, use_cache=False)
        rows = torch.arange(len(ids), device=ids.device)
        return read.last_hidden_state[rows, mask.sum(dim=1) - 1]


class CompactLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """With the head, and `generate`."""

    config_class = CompactLlavaConfig

    def __init__(self, config: CompactLlavaConfig):
        super().__init__(config)
        self.model = CompactLlavaModel(config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """As the model's."""
        return self.model.get_image_features(
            pixel_values, question_input_ids, question_attention_mask, **kwargs
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """Names the questions, so that `generate` takes them; they go where the pixels go."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if question_input_ids is not None and inputs.get("pixel_values") is not None:
            inputs["question_input_ids"] = question_input_ids
            inputs["question_attention_mask"] = question_attention_mask
        return inputs
