"""The labelled cohort: which volumes each number of labels means, in published lists or drawn from a pool."""

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

from ssl_ray.config.schema import LabelledCohort
from ssl_ray.console import say
from ssl_ray.data.datalist import Case, Datalist, read_datalist, subject_of
from ssl_ray.errors import UserError
from ssl_ray.random import number
from ssl_ray.text import shown

_Cases = tuple[Case, ...]


@dataclass(frozen=True)
class Splits:
    """The labelled cohort: a training split for each size, and the validation and test cases that all splits share.

    With `pool`, `training` has one entry, the whole pool under its number of subjects, which `draw` takes from. With
    `folds`, it is the whole cohort, and validation and test cases are those of a fold.
    """

    training: dict[int, tuple[Case, ...]]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]
    organs: tuple[str, ...]
    pool: bool = False
    folds: int = 0

    @property
    def cases(self) -> tuple[Case, ...]:
        """Every labelled case once."""
        every = [case for cases in self.training.values() for case in cases]
        return tuple({case.image: case for case in (*every, *self.validation, *self.test)}.values())

    def pool_size(self, usable: Container[str]) -> int:
        """Number of subjects that a pool has, out of those whose image path is in `usable`."""
        return len(
            {subject_of(case) for cases in self.training.values() for case in cases if str(case.image) in usable}
        )

    def draw(self, size: int, seed: int, run: int, usable: Container[str]) -> tuple[Case, ...]:
        """The cases that a run trains on, out of those whose image path is in `usable`.

        Published splits are the same in all runs. Out of a pool, they are those of the first `size` subjects in an
        order that depends on seed and run: a smaller draw is part of a larger one, and a subject that is not usable
        changes the place of no other.
        """
        listed = next(iter(self.training.values())) if self.pool else self.training[size]
        cases = tuple(case for case in listed if str(case.image) in usable)
        if not self.pool:
            return cases
        order = sorted({subject_of(case) for case in cases}, key=lambda subject: number(seed, "draw", run, subject))
        if len(order) < size:
            raise UserError(f"finetune.cohort.pool: {size} subjects are to be drawn, but {len(order)} are usable")
        drawn = set(order[:size])
        return tuple(case for case in cases if subject_of(case) in drawn)

    def parts(self, size: int, seed: int, run: int, fold: int | None, usable: Container[str]) -> tuple[_Cases, ...]:
        """Training, validation and test cases of one training: those of a run or, where it has some, of a fold of it.

        A run deals all subjects into folds in an order of its own, also those that are not usable. Fold `fold` is
        scored, the next one selects the checkpoint, and training cases are drawn from the others: no network is scored
        on a subject that it has seen in any way.
        """
        if fold is None:
            return self.draw(size, seed, run, usable), self.validation, self.test
        (pool,) = self.training.values()
        order = sorted({subject_of(case) for case in pool}, key=lambda subject: number(seed, "fold", run, subject))
        dealt = {subject: min((place - fold) % self.folds, 2) for place, subject in enumerate(order)}
        scored, selecting, rest = (tuple(case for case in pool if dealt[subject_of(case)] == n) for n in range(3))
        return replace(self, training={size: rest}).draw(size, seed, run, usable), selecting, scored


def read_labelled(cohort: LabelledCohort, sizes: Sequence[int]) -> Splits:
    """The splits of the sizes asked for.

    Each must have as many training volumes as its name says, and no class beyond those of the cohort; validation and
    test volumes and the names of organs must be the same in all. A pool must have as many subjects as the largest size.
    """
    if cohort.pool:
        pool, folds = read_datalist(cohort.root, cohort.pool, labelled=True), cohort.folds
        if folds and pool.test:
            raise UserError(f"{pool.path}: lists a test part, which is scored without finetune.cohort.folds ({folds})")
        if folds:  # every case is scored, those for validation too
            pool = replace(pool, training=pool.training + pool.validation, validation=())
        subjects = len({subject_of(case) for case in pool.training})
        # Two folds are not trained on; the two largest ones are neighbours.
        left = subjects - sum(-(-(subjects - n) // folds) for n in (0, 1)) if folds else subjects
        if max(sizes) > left or (folds or 0) > subjects:
            apart = f" in {folds} folds, which leave {left} while one is scored and one validates" if folds else ""
            what = f"{max(sizes)} subjects are to be drawn from a pool of {subjects}{apart}"
            raise UserError(f"finetune.cohort.sizes: {pool.path}: {what}")
        lists = {subjects: pool}
    else:
        lists = {size: _split(cohort, size) for size in sizes}
    first = next(iter(lists.values()))
    names: dict[int, tuple[Path, str]] = {}
    rule = f"finetune.cohort.classes is {cohort.classes}, background included"
    for size, listed in lists.items():
        if not cohort.pool and len(listed.training) != size:
            raise UserError(f"{listed.path}: the split of {size} volumes lists {len(listed.training)} for training")
        for section in ("validation", "test"):
            for one, other in zip_longest(getattr(listed, section), getattr(first, section)):
                if _written(one) != _written(other):
                    raise UserError(
                        f"{listed.path}: '{section}' differs from that of {first.path}; splits must share it: "
                        f"{_written(one)} against {_written(other)}"
                    )
        if not listed.validation and not cohort.folds:
            raise UserError(f"{listed.path}: 'validation' must list at least one labelled volume")
        if beyond := sorted(value for value in listed.labels if value >= cohort.classes):
            raise UserError(f"{listed.path}: labels {beyond} are beyond the study's: {rule}")
        for value, name in listed.labels.items():
            place, before = names.setdefault(value, (listed.path, name))
            if value and name != before:
                raise UserError(f"{listed.path}: label {value} is {name!r}, but {before!r} in {place}; name it alike")
    organs = tuple(names[value][1] if value in names else f"label {value}" for value in range(1, cohort.classes))
    if 0 < (most := max(names, default=0)) < cohort.classes - 1:
        say(f"WARNING: {names[most][0]} names labels up to {most}, but {rule}: does any volume have a {most + 1}?")
    _tell_shared_labels(lists.values())
    training = {size: listed.training for size, listed in lists.items()}
    return Splits(training, first.validation, first.test, organs, cohort.pool is not None, cohort.folds or 0)


def _tell_shared_labels(lists: Iterable[Datalist]) -> None:
    """Say which images have one label map: of two phases of a scan it may be right, a copied line it seldom is."""
    labels: dict[Path | None, Case] = {}
    twice: dict[Path, str] = {}
    for case in chain(*((*listed.training, *listed.validation, *listed.test) for listed in lists)):
        first = labels.setdefault(case.label, case)
        if case.label and first.image != case.image:
            twice[case.image] = f"{case.place}: {case.label} is the label map of {first.image}, too: is it of both?"
    if twice:
        told, *more = twice.values()
        say(f"WARNING: {told}{f' (and {len(more)} more such)' if more else ''}")


def _written(case: Case | None) -> str:
    """A case as its list has it; None: the list is shorter than the other."""
    if not case:
        return "no volume"
    return " and ".join(str(part) for part in (case.image, case.label, case.subject) if part)


def _split(cohort: LabelledCohort, size: int) -> Datalist:
    """The list of a size, or out of the one list the training cases named by ids."""
    split = (cohort.splits or {})[size]
    if isinstance(split, str):
        return read_datalist(cohort.root, split, labelled=True)
    assert cohort.datalist is not None
    listed = read_datalist(cohort.root, cohort.datalist, labelled=True)
    by_id = {case.id: case for case in listed.training}
    wanted = dict[str, Case]()
    for name in chain.from_iterable(map(_expand, split)):  # one by one: a range may go on far beyond the list
        if name not in by_id:
            raise UserError(f"{listed.path}: splits.{size}: no training volume has the id {shown(repr(name), 80)}")
        wanted[name] = by_id[name]
    return replace(listed, training=tuple(wanted.values()))


def _expand(entry: str) -> Iterator[str]:
    """`img0001..img0006` is a range over the trailing number."""
    match = re.fullmatch(r"(.*?)(\d{1,18})\.\.\1(\d{1,18})", entry)
    if not match:
        yield entry
        return
    width = len(match[2])
    for at in range(int(match[2]), int(match[3]) + 1):
        yield f"{match[1]}{at:0{width}d}"
