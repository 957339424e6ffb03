"""Lengths like those of LLaVA-1.5's second stage, without its files.

What is known: llava_v1_5_mix665k has the parts and sizes of table 7 of the LLaVA-1.5 paper
(arXiv 2310.03744); questions about one image are merged into one conversation; ShareGPT has no
images and long conversations. What is assumed: the text of a part is log-normal, with the medians
and spreads below (tokens of the v1 template's text, its system prompt of about 40 included), and
long conversations are cut at the sequence length.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of the mixture.

    Attributes:
        name: as in the paper's table.
        count: conversations.
        median: tokens of text, the image not counted.
        spread: standard deviation of the logarithm.
        images: how many in each conversation.
    """

    name: str
    count: int
    median: float
    spread: float
    images: int = 1


PARTS = (
    Part("LLaVA", 158_000, 290, 0.40),
    Part("ShareGPT", 40_000, 1300, 0.80, images=0),
    Part("VQAv2", 83_000, 130, 0.45),
    Part("GQA", 72_000, 240, 0.45),
    Part("OKVQA", 9_000, 75, 0.20),
    Part("OCRVQA", 80_000, 160, 0.25),
    Part("A-OKVQA", 66_000, 110, 0.25),
    Part("TextCaps", 22_000, 100, 0.35),
    Part("RefCOCO", 48_000, 330, 0.55),
    Part("VG", 86_000, 420, 0.50),
)
SHORTEST = 50


def lengths(
    count: int = 665_000, *, tokens_per_image: int = 144, longest: int = 2048, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and images, int32 [count] each, of a sample in the mixture's proportions."""
    rng = np.random.default_rng(seed)
    shares = np.array([part.count for part in PARTS]) / sum(part.count for part in PARTS)
    which = rng.choice(len(PARTS), size=count, p=shares)
    medians, spreads = (np.array([getattr(p, key) for p in PARTS]) for key in ("median", "spread"))
    text = medians[which] * np.exp(spreads[which] * rng.standard_normal(count))
    images = np.array([part.images for part in PARTS], np.int32)[which]
    tokens = np.maximum(text, SHORTEST).astype(np.int32) + images * tokens_per_image
    return np.minimum(tokens, longest).astype(np.int32), images
