"""Commands; nothing else."""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssl_ray.config.loading import load
from ssl_ray.console import say, track
from ssl_ray.networks.flops import DEVICES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0, 2 for what the user can mend, 1 for the rest.
    """
    options = _parser().parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop`: as Ctrl-C
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        code: int = options.command(options)
        return code
    except (ValueError, FileNotFoundError, PermissionError) as error:
        print(f"ssl-ray: {error}", file=sys.stderr)
        if os.environ.get("SSL_RAY_TRACEBACK"):
            traceback.print_exc()
        return 2
    except KeyboardInterrupt:
        print("ssl-ray: interrupted; the same command goes on from the last checkpoints", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("SSL_RAY_TRACEBACK"):
            traceback.print_exc()
        print(f"ssl-ray: {type(error).__name__}: {error}", file=sys.stderr)
        print(
            "ssl-ray: SSL_RAY_TRACEBACK=1 shows where; finished work is kept, the same command goes on", file=sys.stderr
        )
        return 1


def entry() -> None:
    """Console script."""
    sys.exit(main())


def _run(options: Any) -> int:
    with _runner(options) as runner:
        failed = runner.grid.failed
        return _show(runner) or (1 if failed else 0)


def _plan(options: Any) -> int:
    workers = [f"pretrain.workers={options.workers}"] if options.workers else []
    study = load(options.experiment, [*options.set, *workers])
    from ssl_ray.estimate.study import make_plan
    from ssl_ray.estimate.text import render
    from ssl_ray.study import identity
    from ssl_ray.study.parts import folders_of

    folders = folders_of(study)
    if folders.output.origin is None:
        identity.check_unchanged(study, folders)
    plan = make_plan(study, folders, options.gpu, with_probe=options.probe)
    say(json.dumps(plan.tree()) if options.json else render(plan))
    return 0


def _prepare(options: Any) -> int:
    with _runner(options) as runner:
        _ = runner.prepared
    return 0


def _pretrain(options: Any) -> int:
    with _runner(options) as runner:
        _ = runner.pretrained
    return 0


def _finetune(options: Any) -> int:
    with _runner(options) as runner:
        return 1 if runner.grid.failed else 0


def _report(options: Any) -> int:
    from ssl_ray.study.runner import Runner

    return _show(Runner(load(options.experiment, options.set)))


def _show(runner: Any) -> int:
    report = runner.report()
    say(f"\n{report.table}\n")
    say(f"report:  {report.html}")
    tracker = runner.tracker
    uri = tracker.uri
    place = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri '{uri}'"
    say(f"MLflow:  {place}   (experiment {tracker.experiment!r})")
    return 0


def _phantom(options: Any) -> int:
    from ssl_ray.phantom.cohort import write_cohort

    write_cohort(
        options.folder,
        unlabelled=options.volumes,
        labelled=options.labelled,
        validation=options.validation,
        test=options.test,
        splits=options.splits,
        seed=options.seed,
        progress=track("synthesizing volumes"),
    )
    say(f"{options.folder}: unlabelled.json, {', '.join(f'labelled_{size}.json' for size in options.splits)}")
    return 0


def _datalist(options: Any) -> int:
    from ssl_ray.data.listing import write_datalists

    written = write_datalists(options.folder, options.splits, options.validation, options.subject, options.seed)
    for name, (training, validation) in written.items():
        say(f"{options.folder / name}: {training} training, {validation} validation volumes")
    return 0


@contextmanager
def _runner(options: Any) -> Iterator[Any]:
    study = load(options.experiment, options.set)
    from ssl_ray.study import identity  # a typo in the YAML must not wait for torch and Ray to load
    from ssl_ray.study.parts import folders_of
    from ssl_ray.study.runner import Runner

    folders = folders_of(study)
    with identity.only_one(folders):
        if getattr(options, "fresh", False) and (kept := identity.set_aside(study, folders)):
            say(f"the old study is kept: {kept}")
        with Runner(study, verify=getattr(options, "verify", False)) as runner:
            yield runner


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssl-ray",
        description="Does self-supervised pretraining on my unlabelled CT help my segmentation, and with how many "
        "labelled volumes? One YAML describes a study; `ssl-ray run` carries it out and skips what is already done.",
        epilog="Exit code 0: done. 2: something to mend in the input, named in one message. 1: anything else.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, function, text in (
        ("run", _run, "the whole study: prepare, pretrain, fine-tune, report"),
        ("plan", _plan, "what a run will take, and what will limit it; nothing is started or written"),
        ("prepare", _prepare, "only bring the volumes into the store"),
        ("pretrain", _pretrain, "prepare, then pretrain"),
        ("finetune", _finetune, "prepare, pretrain, then fine-tune the grid"),
        ("report", _report, "table, figures and page again, from MLflow alone"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("experiment", type=Path, help="the study's YAML, e.g. experiments/demo.yaml")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="replace one value, e.g. --set pretrain.optimizer.lr=2e-4; may be repeated",
        )
        if name in ("run", "pretrain", "finetune"):
            command.add_argument(
                "--fresh", action="store_true", help="start anew; what was done under this name is kept under another"
            )
        if name == "plan":
            command.add_argument(
                "--gpu",
                type=str.lower,
                choices=DEVICES,
                metavar="NAME",
                help=f"estimate for one a worker: {', '.join(DEVICES)}",
            )
            command.add_argument("--workers", type=_count, metavar="N", help="instead of pretrain.workers")
            command.add_argument(
                "--no-probe", dest="probe", action="store_false", help="time no steps here; without --gpu no hours"
            )
            command.add_argument("--json", action="store_true", help="everything, for programs")
        if name == "prepare":
            command.add_argument(
                "--verify",
                action="store_true",
                help="read all sources and stored volumes, even those whose times say that they have not changed",
            )
        command.set_defaults(command=function)

    phantom = commands.add_parser("phantom", help="write a synthetic labelled CT cohort", description=_phantom.__doc__)
    phantom.add_argument("folder", type=Path, metavar="DIR")
    phantom.add_argument("--volumes", type=_count, default=40, metavar="N", help="unlabelled volumes (40)")
    phantom.add_argument("--labelled", type=_count, default=24, metavar="M", help="labelled training volumes (24)")
    phantom.add_argument("--validation", type=_count, default=6, metavar="N", help="labelled validation volumes (6)")
    phantom.add_argument("--test", type=_count, default=8, metavar="N", help="labelled test volumes (8)")
    phantom.add_argument("--splits", type=_count, nargs="+", default=[6, 12, 24], metavar="N", help="nested (6 12 24)")
    phantom.add_argument("--seed", type=int, default=0, metavar="S")
    phantom.set_defaults(command=_phantom)

    datalist = commands.add_parser("datalist", help="write datalists for a folder of NIfTI")
    datalist.add_argument("folder", type=Path, metavar="DIR")
    datalist.add_argument("--splits", type=_count, nargs="*", default=[], metavar="N", help="labelled training volumes")
    datalist.add_argument("--validation", type=_share, default=0.2, metavar="SHARE", help="of the subjects (0.2)")
    datalist.add_argument(
        "--subject",
        default=r".*",
        metavar="REGEX",
        help="what in a file name is the subject, e.g. '(A-\\d+)'; by default every volume is one of its own",
    )
    datalist.add_argument("--seed", type=int, default=0, metavar="S")
    datalist.set_defaults(command=_datalist)
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return number
