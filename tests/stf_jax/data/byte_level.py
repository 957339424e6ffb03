"""Tokenizers of the GPT-2 kind, in small: one token for each byte, and special tokens."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

# Their shape is SmolLM2's and Qwen2's: no beginning, and an end that is the end of a turn.
CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for turn in messages %}<|start_header_id|>{{ turn.role }}<|end_header_id|>"
    "\n\n{{ turn.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip


def write_byte_level(
    target: Path,
    *,
    end: str = "<|end|>",
    begin: str | None = None,
    special: Sequence[str] = (),
    chat_template: str | None = None,
) -> Path:
    """A directory with the tokenizer; ids of special tokens follow those of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={symbol: at for at, symbol in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(one, special=True) for one in special])
    if begin is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, bos_token=begin, chat_template=chat_template
    ).save_pretrained(target)
    return target


def write_chatml(target: Path) -> Path:
    """Of SmolLM2-Instruct's and Qwen2's kind."""
    return write_byte_level(target, end="<|im_end|>", special=IM, chat_template=CHATML)


def write_llama_3(target: Path, *, end: str = "<|eot_id|>") -> Path:
    """Of Llama 3 Instruct's kind; the base model's ends in `<|end_of_text|>`."""
    return write_byte_level(
        target, end=end, begin="<|begin_of_text|>", special=HEADERS, chat_template=LLAMA_3
    )
