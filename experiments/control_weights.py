"""Weights for a control: what a part of the encoder gets from pretrained ones is their size, or all but their size.

    python experiments/control_weights.py shuffled EXPERIMENT.yaml FOLDER PATTERN BEST.safetensors...
    python experiments/control_weights.py rescaled EXPERIMENT.yaml FOLDER PATTERN BEST.safetensors...

The files are the pretrainings of a study's runs, in order; one that served all runs is named once for each. For each,
FOLDER gets `run<r>.safetensors`: the encoder that the study's run r starts from with random weights, in which tensors
whose name matches PATTERN (a regular expression, "" for all) are

    shuffled  those that `init: permuted` starts from: the size of pretrained ones, without what they learned;
    rescaled  those that `init: pretrained` starts from, each multiplied so that its root mean square is the initial
              one's: what they learned, without their size. A tensor that begins as zeros, a bias, is zeros again.

They go into `finetune.weights`. `--set` is that of `ssl-ray`; a run's seed follows from the study's.
"""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.networks.weight_files import describe, export
from ssl_ray.random import run_seed
from ssl_ray.study.experiment import load


def main() -> None:
    """Write a file a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("shuffled", "rescaled"))
    parser.add_argument("experiment", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pattern", type=re.compile)
    parser.add_argument("weights", type=Path, nargs="+")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    study = load(options.experiment, options.overrides)
    config, network, device = study.finetune, study.network, torch.device("cpu")
    options.folder.mkdir(parents=True, exist_ok=True)
    for run, file in enumerate(options.weights):
        seed = run_seed(study.seed, "finetune", run)
        starts = (None, False), (file, options.kind == "shuffled")  # as the random arm, and as the one in question
        arms = [SegmentationLearner(config, network, device, seed, weights, permuted) for weights, permuted in starts]
        initial, state = (arm.network.encoder.state_dict() for arm in arms)
        taken = {name for name in state if options.pattern.search(name)}
        if options.kind == "rescaled":
            state |= {name: _rescaled(state[name], initial[name]) for name in taken}
        state |= {name: weight for name, weight in initial.items() if name not in taken}
        export(options.folder / f"run{run}.safetensors", state, describe(network, config.patch_size))
        numbers = sum(state[name].numel() for name in taken), sum(weight.numel() for weight in state.values())
        print("run {}: {:,} of {:,} numbers are {} pretrained ones".format(run, *numbers, options.kind))


def _rescaled(weight: Tensor, initial: Tensor) -> Tensor:
    """The tensor at the root mean square of another one."""
    size = weight.square().mean().sqrt()
    return weight * (initial.square().mean().sqrt() / size) if size > 0 else weight


if __name__ == "__main__":
    main()
