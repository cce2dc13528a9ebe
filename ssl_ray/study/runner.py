"""The steps of a study in their order; each finds out what is done already and does the rest."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ssl_ray.cluster.connect import connect
from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Preparation, Study
from ssl_ray.console import say, track
from ssl_ray.data.datalist import Case, Splits, check_held_out, read_labelled, read_unlabelled
from ssl_ray.data.prepare import BadVolume, prepare_cohort
from ssl_ray.data.store import Store, Volume
from ssl_ray.phantom.cohort import write_cohort
from ssl_ray.pretrain.driver import Pretrained, pretrain
from ssl_ray.report.write import Report, write_report
from ssl_ray.search.cells import BAD_VOLUMES
from ssl_ray.search.grid import GridResult, check_transfer, finetune
from ssl_ray.search.job import grid_job
from ssl_ray.storage.places import is_uri
from ssl_ray.study import identity
from ssl_ray.study.parts import folders_of, recipe_of, run_params, tracker_of
from ssl_ray.tracking.tracker import Tracker


@dataclass(frozen=True)
class Cohorts:
    """The cases of a study, checked as far as that goes without reading a volume."""

    training: tuple[Case, ...]
    validation: tuple[Case, ...]
    splits: Splits


@dataclass(frozen=True)
class PreparedCohorts:
    """Volumes of the pretraining and of the labelled cohort, by image path."""

    unlabelled: dict[str, Volume]
    labelled: dict[str, Volume]


class Runner:
    """One study being carried out; every step first makes sure of the steps that it needs."""

    def __init__(self, study: Study, verify: bool = False) -> None:
        """Args:
        study: the experiment.
        verify: read all sources and all stored volumes and compare digests, whatever their times say.

        Raises:
            ValueError: when something else was begun under the study's name, or a place cannot be written to.
        """
        self.study, self.verify = study, verify
        self.folders = folders_of(study)
        self.folders.check_writable()
        self.config_yaml = dump(study)
        identity.check_unchanged(study, self.folders)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        if "tracker" in vars(self):
            self.tracker.settle()

    @cached_property
    def tracker(self) -> Tracker:
        """The study's MLflow experiment."""
        return tracker_of(self.study)

    @cached_property
    def cohorts(self) -> Cohorts:
        """Read the datalists; a study on a synthetic cohort makes that first.

        Raises:
            ValueError: for anything that the lists get wrong.
        """
        made = self.study.phantom
        if made:
            numbers = made.model_dump(exclude={"root"})
            write_cohort(Path(made.root), **numbers, progress=track("synthesizing volumes"))
        training, validation = read_unlabelled(self.study.pretrain.sources) if self.study.pretrains else ((), ())
        splits = read_labelled(self.study.finetune.cohort, self.study.finetune.split_sizes)
        check_held_out((*training, *validation), splits)
        if self.study.finetune.weights:
            check_transfer(self.study.finetune, self.study.network, Path(self.study.finetune.weights))
        return Cohorts(training, validation, splits)

    @cached_property
    def prepared(self) -> PreparedCohorts:
        """Both cohorts in the store.

        Raises:
            ValueError: with a table of all bad volumes, unless the study skips them.
        """
        study = self.study
        store = Store(self.folders.cache, self.folders.scratch)
        cohorts = self.cohorts
        connect(study.cluster)
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not (
            is_uri(study.output) or Path(study.output).is_absolute()
        ):
            say(
                f"WARNING: in a submitted job the output folder {study.output!r} lies in Ray's copy of the working "
                "directory, which does not last; give an absolute one, e.g. --set output=/shared/output"
            )
        bad: list[BadVolume] = []
        fresh = 0

        def run(title: str, cases: Sequence[Case], preparation: Preparation, classes: int | None) -> dict[str, Volume]:
            nonlocal fresh
            volumes, unusable, count = prepare_cohort(
                cases, preparation, store, classes, track(title), verify=self.verify
            )
            bad.extend(unusable)
            fresh += count
            return volumes

        cases = (*cohorts.training, *cohorts.validation)
        unlabelled = run("preparing unlabelled volumes", cases, study.pretrain.preparation, None) if cases else {}
        labelled_preparation, classes = study.finetune.preparation, study.finetune.cohort.classes
        labelled = run("preparing labelled volumes", cohorts.splits.cases, labelled_preparation, classes)
        self._settle(bad)
        self._check_held_out(unlabelled, labelled)
        say(f"prepared {fresh} of {len(unlabelled) + len(labelled)} volumes now; the store is {store}")
        return PreparedCohorts(unlabelled, labelled)

    @cached_property
    def pretrained(self) -> Pretrained:
        """The weights that `init: pretrained` starts from: this study's own, or those in `finetune.weights`.

        Raises:
            ValueError: when no usable volume is left.
        """
        given = self.study.finetune.weights
        if given:
            say(f"pretrained weights are given: {given}")
            content = Path(given).read_bytes()
            return Pretrained(Path(given).absolute(), hashlib.sha256(content).hexdigest()[:16])
        if not self.study.pretrains:
            raise ValueError("finetune.grid.init: this study trains only from random weights")
        volumes = self.prepared.unlabelled
        training = [volumes[str(case.image)] for case in self.cohorts.training if str(case.image) in volumes]
        validation = [volumes[str(case.image)] for case in self.cohorts.validation if str(case.image) in volumes]
        if not training or not validation:
            raise ValueError("pretrain.sources: no usable volume is left for training or validation")
        identity.record(self.study, self.folders, "pretrain")
        params = run_params(self.study, "pretrain")
        recipe = recipe_of(self.study)
        done = pretrain(recipe, training, validation, self.folders, self.tracker, params, self.config_yaml)
        say(f"pretraining {'is done' if done.fresh else 'was done already'}: {done.weights}")
        return done

    @cached_property
    def grid(self) -> GridResult:
        """Every cell of the fine-tuning grid."""
        prepared = self.prepared
        pretrained = self.pretrained if "pretrained" in self.study.finetune.grid.init else None
        splits = self.cohorts.splits
        identity.record(self.study, self.folders, "finetune")
        study = self.study
        job = grid_job(study.finetune, study.network, splits, prepared.labelled, pretrained, self.folders)
        done = finetune(job, self.tracker, run_params(study, "finetune"), self.config_yaml)
        say(f"fine-tuning: {done.trained} cells trained now, {done.finished} were done already")
        for name in done.failed:
            say(f"fine-tuning: cell {name} FAILED; its log is under {self.folders.study / 'ray'}")
        return done

    def report(self) -> Report:
        """Table, figures and page, from MLflow alone."""
        report = write_report(self.study, tracker_of(self.study, create=False), self.folders.study)
        for path in (report.markdown, report.html, self.folders.study / "figures"):
            self.folders.output.push(path)
        return report

    def _settle(self, bad: Sequence[BadVolume]) -> None:
        record = self.folders.study / BAD_VOLUMES
        if not bad:
            record.unlink(missing_ok=True)
            return
        width = max(len(one.id) for one in bad)
        table = "\n".join(f"  {one.id:<{width}}  {one.reason}" for one in bad)
        if self.study.on_bad_volume == "fail":
            raise ValueError(
                f"{len(bad)} volumes cannot be used (on_bad_volume: skip goes on without them; the others are kept "
                f"in the store):\n{table}"
            )
        self.folders.study.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({one.id: one.reason for one in bad}, indent=1))
        say(f"going on without {len(bad)} volumes, recorded in {record}:\n{table}")

    def _check_held_out(self, unlabelled: dict[str, Volume], labelled: dict[str, Volume]) -> None:
        """The same bytes under another name are still the same patient."""
        splits = self.cohorts.splits
        trained = [case.image for cases in splits.training.values() for case in cases]
        seen = {volume.image_sha256: path for path, volume in unlabelled.items()}
        seen |= {labelled[str(image)].image_sha256: str(image) for image in trained if str(image) in labelled}
        for part in ("validation", "test"):
            held_out = {
                str(case.image): labelled[str(case.image)]
                for case in getattr(splits, part)
                if str(case.image) in labelled
            }
            for path, volume in held_out.items():
                if volume.image_sha256 in seen:
                    raise ValueError(
                        f"{path}: this labelled {part} volume has the same content as {seen[volume.image_sha256]}, "
                        "which is trained or selected on"
                    )
            seen |= {volume.image_sha256: path for path, volume in held_out.items()}
