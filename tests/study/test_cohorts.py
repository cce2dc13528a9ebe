"""What the lists of a study have to agree with, before a volume is read."""

from pathlib import Path

import pytest
from studies import small_study

from ssl_ray.errors import UserError
from ssl_ray.study.cohorts import read_cohorts


def test_a_warm_up_longer_than_the_pretraining_is_refused(cohort: Path) -> None:
    """Its steps follow from the number of volumes: six of them, two patches each, four a step."""
    training = {"patches_per_volume": 2, "batch_size": 4, "epochs": 2}
    steps = 2 * len(read_cohorts(small_study(cohort=cohort, pretrain=training))[0]) * 2 // 4
    fits = {"optimizer": {"warmup_steps": steps - 1}}
    read_cohorts(small_study(cohort=cohort, pretrain=training | fits))
    with pytest.raises(UserError, match=rf"^pretrain\.optimizer\.warmup_steps: must be below the {steps} steps"):
        read_cohorts(small_study(cohort=cohort, pretrain=training | {"optimizer": {"warmup_steps": steps}}))
