"""How a known picture is used: what of the choices goes together."""

import pytest

from speedit_jax.errors import UserError
from speedit_jax.sampling.known import choose_plan


@pytest.mark.parametrize("choices", [{}, {"inpaint": "network"}, {"inpaint": "repaint", "resample": 1}], ids=str)
def test_steps_that_are_never_run_again_cannot_be_chosen(choices):
    with pytest.raises(UserError, match="jump=5 has no effect with resample=1"):
        choose_plan(True, True, jump=5, **choices)


def test_a_jump_is_for_what_runs_again():
    assert choose_plan(True, False, inpaint="repaint", jump=5).jump == 5
    assert choose_plan(True, False, resample=3, jump=5).jump == 5
