"""Weights for a control: a part of the encoder shuffled pretrained ones, the rest initial ones.

    python experiments/shuffled_part.py EXPERIMENT.yaml FOLDER PATTERN BEST.safetensors...

The files are the pretrainings of a study's runs, in order. For each, FOLDER gets `run<r>.safetensors`: the encoder
that the study's run r starts from with random weights, in which tensors whose name matches PATTERN (a regular
expression) are those that `init: permuted` starts from. They go into `finetune.weights`. With "" for a pattern they are
what that arm starts from, with "(?!)" what the random arm does.
"""

import argparse
import re
from pathlib import Path

import torch

from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.networks.weight_files import describe, export
from ssl_ray.random import run_seed
from ssl_ray.study.experiment import load


def main() -> None:
    """Write a file a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pattern", type=re.compile)
    parser.add_argument("weights", type=Path, nargs="+")
    options = parser.parse_args()
    study = load(options.experiment)
    config, network, device = study.finetune, study.network, torch.device("cpu")
    for run, file in enumerate(options.weights):
        seed = run_seed(study.seed, "finetune", run)
        starts = (None, False), (file, True)  # as the random arm, and as the permuted one
        arms = [SegmentationLearner(config, network, device, seed, weights, permuted) for weights, permuted in starts]
        initial, permuted = (arm.network.encoder.state_dict() for arm in arms)
        state = {name: (permuted if options.pattern.search(name) else initial)[name] for name in initial}
        shuffled = sum(weight.numel() for name, weight in state.items() if options.pattern.search(name))
        options.folder.mkdir(parents=True, exist_ok=True)
        export(options.folder / f"run{run}.safetensors", state, describe(network, config.patch_size))
        total = sum(weight.numel() for weight in state.values())
        print(f"run {run}: {shuffled:,} of {total:,} numbers are shuffled pretrained ones")


if __name__ == "__main__":
    main()
