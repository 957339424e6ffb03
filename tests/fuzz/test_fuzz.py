"""A few hundred damaged inputs, the same ones each time; `python -m tests.fuzz` has more."""

from pathlib import Path

import pytest

from tests.fuzz.harness import Target, attack
from tests.fuzz.targets import TARGETS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_input_works_or_is_refused_in_one_line(target: Target, tmp_path: Path) -> None:
    tally = attack(target, tmp_path, cases=range(target.cases))
    assert not tally.failures, "\n".join(tally.failures[:5])
    # An attack that damages nothing, or of which nothing is left to work, shows nothing.
    assert tally.refused
    assert tally.works
