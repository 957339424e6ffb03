"""What a language model is: sizes only, nothing about files, devices or training."""

import dataclasses
from typing import Literal, Self

from stf_jax.config.checks import check_above_zero, check_positive
from stf_jax.config.quantization import Scheme, check_scheme, parse_scheme

MOST_LAYERS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining."""

    kind: Literal["linear", "llama3"]
    factor: float
    # The rest is read for "llama3" only.
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        check_above_zero(self, "factor", "low_frequency_factor", "high_frequency_factor")
        check_positive(self, "original_positions")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"RopeScaling.high_frequency_factor {self.high_frequency_factor} must be above "
                f"low_frequency_factor {self.low_frequency_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A LLaMA decoder. Defaults: Vicuna-7B-v1.5."""

    vocab_size: int = 32000
    # Rows beyond the vocabulary that make it divide by a mesh; they are never predicted.
    vocab_padding: int = 0
    width: int = 4096
    mlp_width: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 4096
    tie_embeddings: bool = False
    bos_id: int = 1
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int = 0
    # How the weights are stored; None is as plain numbers.
    quantization: str | None = None

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "width", "mlp_width", "heads", "kv_heads")
        # Each has names of its own.
        check_positive(self, "layers", most=MOST_LAYERS)
        check_positive(self, "head_dim", "max_positions")
        check_above_zero(self, "norm_eps", "rope_theta")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")
        if self.quantization is not None:
            inputs = ("width", "head_dim", "mlp_width")
            check_scheme(self.quantization, {name: getattr(self, name) for name in inputs})

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the head."""
        return self.vocab_size + self.vocab_padding

    @property
    def scheme(self) -> Scheme | None:
        """How the projections of the layers are stored; None is as plain numbers."""
        return None if self.quantization is None else parse_scheme(self.quantization)

    @classmethod
    def vicuna_7b(cls) -> Self:
        """lmsys/vicuna-7b-v1.5."""
        return cls()

    @classmethod
    def vicuna_13b(cls) -> Self:
        """lmsys/vicuna-13b-v1.5."""
        return cls(width=5120, mlp_width=13824, layers=40, heads=40, kv_heads=40)

    @classmethod
    def tiny(cls) -> Self:
        """Two layers with grouped key-value heads: for tests and first steps."""
        return cls(
            vocab_size=600, width=64, mlp_width=112, layers=2, heads=8, kv_heads=4, head_dim=8
        )
