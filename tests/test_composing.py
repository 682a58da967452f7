"""What tests compose in their own way is what Hydra composes."""

import pytest

from launch.compose import compose
from tests.agreement.cases import EVERYDAY, Case, own
from tests.agreement.grid_cases import GridCase
from tests.composing import compose_fast

CASES = [*EVERYDAY.values(), Case(model="vit", precision="bf16"), GridCase(strategy="3d", world_size=8), own("Blocks")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_config_is_hydras(case: Case) -> None:
    words = [*case.overrides, "run_dir='a b'"]
    assert list(compose_fast(words).items()) == list(compose(words).items())


def test_a_key_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(Exception, match="sequence_lenght"):
        compose_fast(["data=text", "data.sequence_lenght=8"])
