"""One trial: a training, the choice of its best checkpoint, and its scores. Pure torch, without Ray."""

import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_ray.config.depends import digest
from ssl_ray.data.nifti import read_label
from ssl_ray.data.normalise import VERSION
from ssl_ray.data.patch import open_array
from ssl_ray.data.store import Volume
from ssl_ray.evaluate.metrics import evaluate, evaluate_canonical
from ssl_ray.evaluate.planes import FILE, Planes, cut, to_npz
from ssl_ray.evaluate.scores import DICE_FOREGROUND, CaseScores, aggregate
from ssl_ray.finetune.job import EVALUATION, Record, TrialJob
from ssl_ray.finetune.learner import SegmentationLearner, precision_of
from ssl_ray.finetune.patches import PatchSampler
from ssl_ray.networks.flops import network_cost
from ssl_ray.networks.model_file import MODEL_FILE, Inference, Metadata, model_content, versions
from ssl_ray.networks.registry import build_segmentation
from ssl_ray.storage.files import write_file
from ssl_ray.training.checkpoint import load_latest, save_latest, snapshot
from ssl_ray.training.meters import PREFIX, RATE, WAIT, WORKER_MEMORY, arithmetic_rate, device_name, peak_memory
from ssl_ray.training.nonfinite import Fault, FiniteSum, Watch, keep
from ssl_ray.training.optimizer import learning_rate
from ssl_ray.training.precision import named, settle
from ssl_ray.training.prefetch import ahead


class Trial:
    """One training, from initial weights to the evaluation of its best checkpoint.

    A trial that was cut off anywhere and is started again goes on from its own newest checkpoint, and ends bit for bit
    as if nothing had happened.
    """

    def __init__(self, job: TrialJob, device: torch.device) -> None:
        """A UserError where pretrained weights do not match the network."""
        self.job = job
        here = named(precision_of(job.config, job.network, device))
        precision = settle(job.config.precision, here, job.settled or job.folder, job.mirror)
        self.config = job.config.model_copy(update={"precision": precision})
        self.learner = SegmentationLearner(self.config, job.network, device, job.seed, job.weights, job.permuted)
        self.sampler = PatchSampler(job.data.training, job.data.store, job.config, job.seed)
        shapes = self.config.patch_size, self.config.preparation.channels, self.config.cohort.classes
        self.flops = network_cost(build_segmentation, job.network, *shapes).training
        self.losses = FiniteSum()
        self.best, self.best_step = -1.0, 0
        self.best_weights: dict[str, Tensor] = {}
        self.watch = Watch(self.config.on_nonfinite, self.config.max_skipped)
        self.records: tuple[list[Record], list[Record]] = [], []  # before and since the newest checkpoint
        self.saved = time.monotonic()

    @property
    def facts(self) -> dict[str, str]:
        """What it computes in, and on."""
        return {"precision": self.config.precision, "device": device_name(self.learner.device)}

    def train(self) -> Iterator[Record]:
        """Take every optimizer step that is left, and yield `(step, metrics)` on the way.

        First comes `started_at`, the step that the trial goes on from, and then once more the records that a driver
        which was cut off with the trial may not have got. After that `loss`, `lr`, `validation/<metric>`,
        `system/<metric>`, and `skipped_steps`, the number of steps whose loss or gradient was not finite, where there
        are any.

        Raises:
            FloatingPointError: when more steps in a row are not finite than `on_nonfinite` and `max_skipped` allow.
        """
        config, start = self.config, self._restore()
        yield start, {"started_at": float(start)}
        yield from self.records[0]
        log_every = max(1, config.validate_every // 10)
        self._begin_record(start)
        batches = ahead(self._batch, range(start, config.steps), threads=1)
        for step in range(start, config.steps):
            lr, asked = learning_rate(self.config.optimizer, step, config.steps), time.perf_counter()
            images, labels = next(batches)
            waited = time.perf_counter() - asked
            self.learner.thaw(step)
            loss, norm = self.learner.step(images, labels, lr)
            self.losses.add(loss)
            self.waited += waited
            self._note(self.watch.look(step, loss, norm))
            done = step + 1
            validate = done % config.validate_every == 0 or done == config.steps
            if not (validate or done % log_every == 0):
                continue
            self._note(self.watch.last())
            total, finite = self.losses.take()
            metrics = {"lr": lr} | ({"loss": total / finite} if finite else {}) | self._usage(done)
            if validate:
                metrics |= self._validate(done)
            record = done, metrics
            self.records[1].append(record)
            # The last step is always saved, so that a fault in the evaluation does not cost minutes.
            if validate and (done == config.steps or time.monotonic() - self.saved >= 60 * config.checkpoint_minutes):
                self._save(done)
            self._begin_record(done)
            yield record

    def evaluate(self) -> dict[str, float]:
        """Score the weights that had the best foreground Dice on validation, after `train` is through.

        Returns:
            `selected/step`, `selected/validation/<metric>` and, where the cohort has a test split,
            `selected/test/<metric>`. The folder then holds `model.safetensors`, `planes.npz` and `evaluation.json`.
        """
        data = self.job.data
        self.learner.network.load_state_dict(self.best_weights)
        threads = max(0, int(self.config.cpus_per_trial) - 1)
        scored = list(ahead(self._score, self._predict(data.validation + data.test), threads))
        known = len(data.validation)
        planes = {case.case: one for case, one in scored[known:] or scored}
        cases = [case for case, _ in scored]
        scores = {"validation": cases[:known], "test": cases[known:]}
        tree = {"step": self.best_step, "organs": list(data.organs)}
        tree |= {name: [asdict(case) for case in cases] for name, cases in scores.items()}
        means = {name: aggregate(cases, data.organs) for name, cases in scores.items()}
        files = {MODEL_FILE: model_content(self.best_weights, self._metadata(means)), FILE: to_npz(planes)}
        files[EVALUATION] = json.dumps(tree, indent=1).encode()
        for name, content in files.items():  # in this order; each is whole or not there
            write_file(self.job.folder / name, content)
            self.job.mirror.push(self.job.folder / name)
        named = {f"selected/{name}/{key}": value for name, part in means.items() for key, value in part.items()}
        return {"selected/step": float(self.best_step)} | named

    def _metadata(self, scores: dict[str, dict[str, float]]) -> Metadata:
        """What the model file says of itself."""
        config, flips, data = self.config, self.config.augmentation, self.job.data
        parts = {"training": data.training, "validation": data.validation, "test": data.test}
        return Metadata(
            network=self.job.network,
            patch_size=config.patch_size,
            preparation=config.preparation,
            preparation_version=VERSION,
            organs=data.organs,
            flip_axes=flips.flip_axes if flips.flip_prob else (),
            inference=Inference(
                overlap=config.sliding_window_overlap,
                batch=config.sliding_window_batch,
                precision="bfloat16" if self.learner.dtype == torch.bfloat16 else "float32",
            ),
            surface_tolerance=config.surface_tolerance,
            versions=versions(),
            data={name: (len(part), digest(*sorted(volume.key for volume in part))) for name, part in parts.items()},
            lineage={**self.job.lineage, "seed": self.job.seed, "step": self.best_step},
            scores=scores,
        )

    def _begin_record(self, step: int) -> None:
        self.logged, self.skipped, self.waited, self.since = step, 0, 0.0, time.perf_counter()

    def _usage(self, step: int) -> dict[str, float]:
        """What the steps since the last record took. On a GPU their loss must have been read, or they still run."""
        config, learner = self.config, self.learner
        steps, seconds = step - self.logged, time.perf_counter() - self.since
        rate = steps * config.volumes_per_step * config.patches_per_volume / seconds
        metrics = {f"{PREFIX}seconds_per_step": seconds / steps, WAIT: 100 * self.waited / seconds, RATE: rate}
        metrics |= {"skipped_steps": float(self.skipped)} if self.skipped else {}
        metrics[WORKER_MEMORY] = peak_memory(learner.device) / 1e6
        if config.encoder.freeze != "none":  # less is computed than was counted
            return metrics
        return metrics | arithmetic_rate(rate * self.flops, 1, learner.device, learner.dtype)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        images, labels = self.sampler.batch(step)
        if self.learner.device.type == "cuda":  # copies from memory that is not pinned wait for the steps before them
            images, labels = images.pin_memory(), labels.pin_memory()
        return images, labels

    def _note(self, fault: Fault | None) -> None:
        """Write down what reproduces a step that was not finite, which has left the weights as they were."""
        if fault is None:
            return
        self.skipped += 1
        step, sampler = fault.step, self.sampler
        patches = [{"patch": index, "volume": volume.id, "key": volume.key} for index, volume in sampler.patches(step)]
        volumes = ", ".join(dict.fromkeys(str(patch["volume"]) for patch in patches))
        origin = f"patches {patches[0]['patch']} to {patches[-1]['patch']} of seed {sampler.seed}, volumes {volumes}"
        facts = {"seed": sampler.seed, "patches": patches, "precision": str(self.learner.dtype)}
        facts |= {"lr": learning_rate(self.config.optimizer, step, self.config.steps)}
        # On a GPU the next step is already done: if it was finite, these are the weights after it.
        images, labels = sampler.batch(step)
        tensors = {f"model.{name}": value for name, value in self.learner.network.state_dict().items()}
        tensors |= {"images": images, "labels": labels}
        kept = keep(fault, self.job.folder / "faults", origin, tensors, facts)
        text = f"step {step + 1}: {kept}"
        if fault.fatal:
            raise FloatingPointError(f"{fault.row} step(s) in a row were not finite, the last one was {text}")
        logging.getLogger(__name__).warning("skipped %s", text)

    def _validate(self, step: int) -> dict[str, float]:
        classes = self.config.cohort.classes
        cases = [
            evaluate_canonical(volume.id, prediction, truth.to(prediction.device), classes)
            for volume, truth, prediction in self._predict(self.job.data.validation)
        ]
        found = aggregate(cases, self.job.data.organs)
        if (score := found.get(DICE_FOREGROUND, 0.0)) > self.best:
            self.best, self.best_step = score, step
            self.best_weights = snapshot(self.learner.network.state_dict())
        return {f"validation/{name}": value for name, value in found.items()}

    def _predict(self, volumes: Iterable[Volume]) -> Iterator[tuple[Volume, Tensor, Tensor]]:
        """Each volume with its truth and its prediction, both (X, Y, Z); a thread reads the next volume meanwhile."""
        for volume, image, truth in ahead(self._read, volumes, threads=1):
            yield volume, truth, self.learner.predict(image, volume.levels)

    def _read(self, volume: Volume) -> tuple[Volume, Tensor, Tensor]:
        image, label = (open_array(self.job.data.store, volume.key, name) for name in ("image", "label"))
        stored = torch.from_numpy(np.array(image)).reshape(-1, *volume.shape)
        return volume, stored, torch.from_numpy(np.array(label))

    def _score(self, case: tuple[Volume, Tensor, Tensor]) -> tuple[CaseScores, Planes]:
        """All scores of a case, and what a picture shows of it. The original labels are read only here: few at once."""
        volume, truth, prediction = case
        assert volume.label_source is not None
        original = read_label(Path(volume.label_source))
        image = open_array(self.job.data.store, volume.key).reshape(-1, *volume.shape)[0]
        planes = cut(image, prediction.cpu().numpy(), truth.numpy(), np.array(volume.affine))
        scores = evaluate(
            volume.id,
            prediction.cpu(),
            truth,
            np.array(volume.affine),
            original.voxels.astype(np.uint8, order="C"),  # NIfTI lays the axes out in Fortran's order
            original.affine,
            classes=self.config.cohort.classes,
            tolerance=self.config.surface_tolerance,
            subject=volume.subject,
        )
        return scores, planes

    def _save(self, step: int) -> None:
        older, newer = self.records
        weights = self.learner.network.state_dict()
        state = {
            "key": self.job.key,
            "step": step,
            "model": weights,
            "optimizer": self.learner.optimizer.state_dict(),
            "best": self.best,
            "best_step": self.best_step,
            # Tensors that appear twice are written once.
            "best_weights": weights if self.best_step == step else self.best_weights,
            "row": self.watch.row,
            "records": older + newer,
        }
        save_latest(self.job.checkpoints, state, self.job.mirror)
        self.records, self.saved = (newer, []), time.monotonic()

    def _restore(self) -> int:
        state = load_latest(self.job.checkpoints, self.job.key, self.job.mirror)
        if state is None:
            return 0
        self.learner.network.load_state_dict(state["model"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_step, self.best_weights = (state[n] for n in ("best", "best_step", "best_weights"))
        self.watch.row, self.records = state["row"], (state["records"], [])
        return int(state["step"])
