"""What a pretraining goes on from, and when it is written."""

import time
from typing import Any

from ray.train.collective import broadcast_from_rank_zero

from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.records import Reporter
from ssl_ray.pretrain.stream import Batch
from ssl_ray.training.checkpoint import Saver, load_latest
from ssl_ray.training.nonfinite import Watch


class Checkpoints:
    """The checkpoints of a run; rank 0 reads and writes them for all ranks, each of which calls every method."""

    def __init__(
        self, job: Job, rank: int, learner: PretrainingLearner, watch: Watch[Batch], reporter: Reporter
    ) -> None:
        self._job, self._rank = job, rank
        self._learner, self._watch, self._reporter = learner, watch, reporter
        self._saver = Saver(job.checkpoints, job.recipe.settings.keep_checkpoints, job.mirror)
        self._saved = time.monotonic()

    def restore(self) -> int:
        """Load the newest whole checkpoint of this run; returns the step to go on from, 0 where there is none."""
        found = load_latest(self._job.checkpoints, self._job.key, self._job.mirror) if self._rank == 0 else None
        plain = {name: found[name] for name in ("step", "best", "row_not_finite")} if found else None
        plain = broadcast_from_rank_zero(plain)
        if plain:
            self._learner.load(found or plain)
            self._watch.row = plain["row_not_finite"]
        step = int(plain["step"]) if plain else 0
        self._reporter.start(step, found["records"] if found else [])
        return step

    @property
    def due(self) -> bool:
        """Whether `checkpoint_minutes` have passed since the last one, by this rank's clock."""
        return time.monotonic() - self._saved >= 60 * self._job.recipe.settings.checkpoint_minutes

    def save(self, step: int) -> None:
        """Begin to write a checkpoint, once the one before is written."""
        state: dict[str, Any] = self._learner.state()
        records = self._reporter.carry()
        if self._rank == 0:
            own = {"step": step, "key": self._job.key, "records": records, "row_not_finite": self._watch.row}
            self._saver.save(state | own)
        self._saved = time.monotonic()

    def wait(self) -> None:
        """Return when the last checkpoint is written."""
        self._saver.wait()
