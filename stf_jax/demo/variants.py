"""The arms of the experiment: what may stand between the vision tower and the language model."""

import dataclasses

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.systems.base import FusionConfig, MBTFConfig

# The hidden states that MBTF mixes: all but the first and the last, the highest first.
TAPS = (4, 3, 2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make vision tokens.

    Attributes:
        name: of its folder.
        title: in tables and plots.
        fusion: how.
        pretrain_rate: the peak learning rate of stage 1, chosen by `stf_jax.demo.rates`.
    """

    name: str
    title: str
    fusion: FusionConfig
    pretrain_rate: float


def all_arms(vision: VisionConfig, text: TextConfig) -> dict[str, Arm]:
    """The paper's four, with its multiples of the tower's width."""
    tap, width = TAPS[0], vision.width
    stf = FusionConfig(
        taps=(tap,), mbtf=None, reduction="stf", window=2, projector_width=16 * width
    )
    arms = (
        Arm(
            name="llava",
            title="LLaVA-1.5",
            fusion=FusionConfig.llava(text_width=text.width, tap=tap),
            pretrain_rate=1e-2,
        ),
        Arm(
            name="average",
            title="AvgPool",
            fusion=FusionConfig.average(text_width=text.width, tap=tap),
            pretrain_rate=3e-2,
        ),
        Arm(name="stf", title="STF", fusion=stf, pretrain_rate=1.5e-3),
        Arm(
            name="stf_mbtf",
            title="STF + MBTF",
            fusion=dataclasses.replace(stf, taps=TAPS, mbtf=MBTFConfig(mlp_width=4 * width)),
            pretrain_rate=1.5e-3,
        ),
    )
    return {arm.name: arm for arm in arms}
