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

from ssl_ray.networks.protocol import Encoder
from ssl_ray.networks.registry import build_segmentation
from ssl_ray.networks.transfer import permute, transfer
from ssl_ray.networks.weight_files import describe, export, load_metadata, load_weights
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
    config, size = study.finetune, study.finetune.patch_size
    for run, file in enumerate(options.weights):
        seed = run_seed(study.seed, "finetune", run)
        torch.manual_seed(seed)  # as a trial does before it builds its network
        encoder = build_segmentation(study.network, size, config.preparation.channels, config.cohort.classes).encoder
        assert isinstance(encoder, Encoder)
        initial = {name: weight.clone() for name, weight in encoder.state_dict().items()}
        transfer(load_weights(file), encoder, str(file), load_metadata(file))
        permute(encoder, seed)
        state = {
            name: weight if options.pattern.search(name) else initial[name]
            for name, weight in encoder.state_dict().items()
        }
        shuffled = sum(weight.numel() for name, weight in state.items() if options.pattern.search(name))
        options.folder.mkdir(parents=True, exist_ok=True)
        export(options.folder / f"run{run}.safetensors", state, describe(study.network, size))
        total = sum(weight.numel() for weight in state.values())
        print(f"run {run}: {shuffled:,} of {total:,} numbers are shuffled pretrained ones")


if __name__ == "__main__":
    main()
