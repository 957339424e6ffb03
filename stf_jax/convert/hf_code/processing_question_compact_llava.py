"""For models that read what an image is asked: the question's own ids, beside the prompt's."""

import torch

from .processing_compact_llava import CompactLlavaProcessor

_END = "ASSISTANT"


class QuestionCompactLlavaProcessor(CompactLlavaProcessor):
    """Adds `question_input_ids` and `question_attention_mask`, one row for each image."""

    def __call__(self, images=None, text=None, **kwargs):
        """As LLaVA's processor, with the questions [N, Q] of its N images, padded on the right."""
        inputs = super().__call__(images=images, text=text, **kwargs)
        if images is None or text is None:
            return inputs
        prompts = [text] if isinstance(text, str) else text
        rows = []
        for prompt in prompts:
            # The images of a prompt share its question.
            rows += [self._question_ids(prompt)] * prompt.count(self.image_token)
        longest, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        questions = {
            "question_input_ids": [row + [pad] * (longest - len(row)) for row in rows],
            "question_attention_mask": [
                [1] * len(row) + [0] * (longest - len(row)) for row in rows
            ],
        }
        if isinstance(inputs["input_ids"], torch.Tensor):
            questions = {name: torch.tensor(ids) for name, ids in questions.items()}
        inputs.update(questions)
        return inputs

    def _question_ids(self, prompt: str) -> list[int]:
        """Ids of the question alone, BOS first; where there is neither, the end of a text."""
        if _END not in prompt:
            raise ValueError(
                f"this model reads the question, which ends at {_END!r}, and the prompt has none; "
                "write it with apply_chat_template"
            )
        ids = self.tokenizer(find_question(prompt, self.image_token))["input_ids"]
        return ids[: self.question_length] or [self.tokenizer.eos_token_id]


def find_question(prompt: str, image_token: str) -> str:
    """Behind the last image, what stands between the first line break and the next "ASSISTANT"."""
    behind = prompt.rpartition(image_token)[2]
    behind = behind[behind.find("\n") + 1 :]
    return behind[: behind.find(_END)].strip()
