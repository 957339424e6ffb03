"""Text and images to tensors: an image takes as many placeholders as it has tokens."""

from transformers import LlavaProcessor
from transformers.processing_utils import MultiModalData


class CompactLlavaProcessor(LlavaProcessor):
    """LLaVA's, with a number of tokens an image that does not follow from its size.

    Args:
        tokens_per_image: placeholders of an image.
        question_length: tokens of an image's question that the model reads, at most.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        tokens_per_image=576,
        question_length=0,
        **kwargs,
    ):
        self.tokens_per_image = tokens_per_image
        self.question_length = question_length
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        """The placeholders of one image."""
        return self.image_token * self.tokens_per_image

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """What vLLM asks for: placeholders of images of these sizes."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.tokens_per_image] * count, num_image_patches=[1] * count
        )
