"""Which process of several this is: what launchers say, and what is refused because nothing can be made of it."""

import pytest

from l3ms.ranks.launched import Launched, launched

BY_HAND = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
BY_TORCHRUN = {**BY_HAND, "LOCAL_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "a",
               "TORCHELASTIC_RESTART_COUNT": "2"}  # fmt: skip


def test_a_process_is_one_of_several_where_the_launcher_says_so():
    assert launched(BY_HAND) == Launched(3, 4, 3, "10.0.0.1", 29500, False, "/0")
    assert launched(BY_TORCHRUN) == Launched(3, 4, 1, "10.0.0.1", 29500, True, "a/2")
    assert launched({}) is None
    assert launched({"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "1"}) is None
    assert launched({**BY_HAND, "WORLD_SIZE": "1", "RANK": "0"}) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": "4"}, "below WORLD_SIZE"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"WORLD_SIZE": None, "OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4"),
        (
            {"WORLD_SIZE": None, "SLURM_STEP_NUM_TASKS": "4"},
            "SLURM_STEP_NUM_TASKS is 4 .*WORLD_SIZE=1 for runs of their own",
        ),
    ],
)
def test_half_an_environment_is_refused_with_the_way_out(changes, said):
    environment = {name: value for name, value in {**BY_HAND, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=said) as refused:
        launched(environment)
    assert "torchrun or accelerate launch" in str(refused.value)
