"""An experiment file is typed: what is wrong in it is named, what is right survives a round trip."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from studies import small_tree, write_study

from ssl_ray.config.loading import dump, flatten, parse
from ssl_ray.config.schema import Finetune, Preparation, Pretrain, Study
from ssl_ray.errors import UserError
from ssl_ray.pretrain.tasks.masked.settings import Masked
from ssl_ray.pretrain.tasks.restoration.settings import Restoration
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of, tracker_of

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))

STUDY = """
name: small
pretrain:
  sources:
    - {root: a, datalist: unlabelled.json}
    - {root: b, datalist: unlabelled.json}
  preparation: {spacing: 2, hu_window: [-57, 164]}
finetune:
  cohort:
    root: a
    classes: 14
    splits: {6: six.json, 12: twelve.json}
  preparation: {spacing: [1.5, 1.5, 2], hu_window: [-175, 250]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def change(file: Path, key: str, value: Any) -> Path:
    """Set one dotted key in the file; numbers are places in a list; the value None removes it."""
    tree: Any = yaml.safe_load(file.read_text())
    node = tree
    *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    for parent in parents:
        node = node[parent] if isinstance(parent, int) else node.setdefault(parent, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(file, overrides)
    return str(caught.value)


def test_experiments_are_shipped() -> None:
    """There is at least one experiment, so that the tests over all of them test something."""
    assert len(EXPERIMENTS) > 0


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_loads_and_survives_dump(path: Path, tmp_path: Path) -> None:
    """Every experiment in the repository is valid, and its resolved form describes the same study."""
    study = load(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump(study))
    assert load(resolved) == study


def test_the_recipe_is_the_default(file: Path) -> None:
    """What a study leaves out is the published recipe."""
    study = load(file)
    pretrain, finetune, network = study.pretrain, study.finetune, study.network
    assert (pretrain.patch_size, pretrain.patches_per_volume, pretrain.batch_size) == ((96, 96, 96), 2, 8)
    assert (pretrain.epochs, pretrain.optimizer.name, pretrain.optimizer.lr) == (300, "adam", 1e-4)
    assert pretrain.task.kind == "restoration"
    assert not pretrain.task.contrastive.enabled
    assert pretrain.task.contrastive.temperature == 0.05
    assert (network.hidden_size, network.mlp_dim, network.num_heads, network.feature_size) == (768, 3072, 12, 16)
    assert (finetune.steps, finetune.volumes_per_step, finetune.patches_per_volume) == (30_000, 1, 4)
    assert (finetune.optimizer.name, finetune.optimizer.weight_decay) == ("adamw", 1e-5)
    assert finetune.augmentation.flip_axes == (0, 1, 2)
    assert (finetune.sliding_window_batch, finetune.validate_every) == (4, 100)


def test_a_learning_rate_changes_nothing_else(file: Path) -> None:
    """The rest of the optimizer stays the recipe's where one key of it is given."""
    study, given = load(file), load(file, ["pretrain.optimizer.lr=1e-3", "finetune.optimizer.lr=1e-3"])
    for stage in ("pretrain", "finetune"):
        expected = getattr(study, stage).optimizer.model_copy(update={"lr": 1e-3})
        assert getattr(given, stage).optimizer == expected


def test_resolved_study_survives_dump_with_everything_set(file: Path, tmp_path: Path) -> None:
    """No field loses its value or type on the way through YAML."""
    study = load(
        file,
        [
            "finetune.cohort.splits={1: [img0001], 3: [img0001..img0003]}",
            "finetune.cohort.datalist=all.json",
            "finetune.runs=3",
            "finetune.primary=1",
            "pretrain.pretrainings=3",
            "finetune.grid={sizes: [1], lr: [1e-4, 3e-5], init: [pretrained]}",
            "phantom={root: p, unlabelled: 3, labelled: 2, validation: 1, test: 1, splits: [1, 2], seed: 5}",
            "pretrain.optimizer={name: adamw, lr: 1e-12, schedule: cosine, warmup_steps: 9, clip_norm: 0.5}",
            "pretrain.patch_size=[32, 48, 64]",
            "pretrain.task.corruption={inpaint_size: [1, 5], outpaint_size: [8, 8], shuffle_size: 4}",
            "pretrain.preparation.orientation=null",
            "tracking={uri: 'sqlite:///x.db', experiment: 'öäü: #1'}",
        ],
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump(study))
    assert load(resolved) == study
    assert study.finetune.cohort.splits == {1: ("img0001",), 3: ("img0001..img0003",)}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("pretrian", "pretrain"),
        ("finetune.step", "steps"),
        ("finetune.cohort.clases", "classes"),
        ("finetune.preparation.spacng", "spacing"),
        ("finetune.augmentation.flip_axis", "flip_axes"),
        ("finetune.optimizer.learning_rate", None),
        ("finetune.grid.size", "sizes"),
        ("finetune.loss.include_backgrund", "include_background"),
        ("pretrain.task.contrastive.enable", "enabled"),
        ("pretrain.task.corruption.inpaint_box", "inpaint_boxes"),
        ("pretrain.sources.0.rooot", "root"),
        ("pretrain.sources.1.datalst", "datalist"),
        ("network.hiden_size", "hidden_size"),
        ("tracking.url", "uri"),
        ("cluster.cpu", "cpus"),
        ("phantom.label", "labelled"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(file: Path, key: str, near: str | None) -> None:
    """At every level, inside lists too, a mistyped key gives its full name and the key that was meant."""
    message = refusal(change(file, key, 1))
    line = next(line for line in message.splitlines() if "unknown key" in line)
    assert f"{file}: {key}: unknown key; " in line
    assert (f"did you mean '{near}'?" in line) if near else ("valid keys: name, lr," in line)


def test_a_task_is_named_by_a_string_or_by_its_kind(file: Path) -> None:
    """Restoration where nothing is said; what is left out of a task is its default."""
    assert load(file).pretrain.task == Restoration()
    assert load(file, ["pretrain.task=masked"]).pretrain.task == Masked()
    assert load(file, ["pretrain.task={kind: masked, loss: l1}"]).pretrain.task == Masked(loss="l1")
    assert load(file, ["pretrain.task.corruption.growing=true"]).pretrain.task.corruption.growing


@pytest.mark.parametrize(
    ("task", "rule"),
    [
        ("maskd", "pretrain.task: must be one of 'restoration', 'masked'; did you mean 'masked'? got 'maskd'"),
        ({"kind": "masked", "ration": 0.5}, "pretrain.task.ration: unknown key; did you mean 'ratio'?"),
        ({"kind": "masked", "ratio": 1}, "pretrain.task.ratio: input should be less than 1, got 1"),
        ({"kind": "masked", "corruption": {}}, "pretrain.task.corruption: unknown key"),
        ({"kind": "masked", "decoder_size": 100}, "decoder_size: input should be a multiple of 32, got 100"),
        (
            {"kind": "masked", "ratio": 0.999},
            "ratio: 0.999 of the 216 tokens of a patch [96, 96, 96] leaves 0 to be",
        ),
        ({"kind": "masked", "ratio": 0.001}, "leaves 216 to be seen; at least one must be seen and one dropped"),
    ],
)
def test_a_broken_rule_of_a_task_is_named_without_its_kind(file: Path, task: Any, rule: str) -> None:
    """The place is the key in the YAML."""
    assert rule in refusal(change(file, "pretrain.task", task))


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    """One message has a line for each mistake, so that mending takes one round."""
    for key, value in (("pretrain.epochs", 0), ("network.hiden_size", 3), ("name", None)):
        change(file, key, value)
    lines = refusal(file).splitlines()
    assert len(lines) == 3
    assert any(line.endswith("name: this key is required") for line in lines)
    assert any("pretrain.epochs: input should be greater than 0, got 0" in line for line in lines)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("pretrain.patch_size", 72, "pretrain.patch_size: a side must be a multiple of 16, the side of a token"),
        ("pretrain.patch_size", 0, "pretrain.patch_size.0: input should be greater than 0, got 0"),
        ("finetune.patch_size", [32, 32, 50], "(unetr), got [32, 32, 50]: 50 = 3 x 16 + 2"),
        ("pretrain.preparation.hu_window", [164, -57], "hu_window: the lower HU must be below the upper, got [164.0, "),
        ("pretrain.preparation.hu_window", [5, 5], "hu_window: the lower HU must be below the upper"),
        ("pretrain.preparation.hu_window", [-math.inf, 5], "normalise.hu_window.0: input should be a finite number"),
        ("pretrain.preparation.hu_window", [0, math.nan], "normalise.hu_window.1: input should be a finite number"),
        ("pretrain.preparation.hu_window", [0], "preparation.normalise.hu_window.1: this key is required"),
        ("pretrain.preparation.spacing", [1, 0, 1], "pretrain.preparation.spacing.1: input should be greater than 0"),
        ("pretrain.preparation.spacing", math.inf, "pretrain.preparation.spacing.0: input should be a finite number"),
        ("pretrain.preparation.orientation", "RPI", "orientation: input should be 'RAS', 'LPS' or 'LAS', got 'RPI'"),
        ("pretrain.workers", 9, "batch_size must give every worker a patch, got 8 for 9 workers"),
        ("pretrain.patch_size", [96, 96, 48], "a box of 64 voxels does not fit into patch_size [96, 96, 48]"),
        ("pretrain.task.corruption.shuffle_size", 97, "corruption: a box of 97 voxels does not fit"),
        ("pretrain.task.corruption.inpaint_size", [9, 8], "inpaint_size: the smallest side must not exceed the larg"),
        (
            "pretrain.task.corruption",
            {"inpaint_boxes": 0, "outpaint_prob": 0, "shuffle_prob": 0},
            "pretrain.task.corruption: inpaint_boxes, outpaint_prob and shuffle_prob must not all be 0: noth",
        ),
        ("pretrain.sources", [], "pretrain.sources: at least one value, and none twice, got []"),
        ("pretrain.optimizer.lr", 0, "pretrain.optimizer.lr: input should be greater than 0, got 0"),
        ("pretrain.optimizer.weight_decay", math.inf, "weight_decay: input should be a finite number, got inf"),
        ("pretrain.epochs", 1.5, "pretrain.epochs: input should be a valid integer"),
        ("pretrain.optimizer.betas", [1, 1], "pretrain.optimizer.betas.0: input should be less than 1, got 1"),
        ("finetune.optimizer.warmup_steps", 30_000, "optimizer.warmup_steps: must be below the 30000 steps of this"),
        ("finetune.gpus_per_trial", 1.5, "gpus_per_trial must be a share of one GPU or a whole number, got 1.5"),
        ("finetune.cohort.splits", {6: ["a"]}, "splits.6 lists ids: name the list that they come from in 'datalist'"),
        ("finetune.cohort.splits", {}, "finetune.cohort.splits: at least one value, and none twice, got []"),
        ("finetune.cohort.splits", {"six": "a"}, "finetune.cohort.splits.six: input should be a valid integer"),
        ("finetune.cohort.splits", {6: 5}, "finetune.cohort.splits.6: input should be a valid string, got 5"),
        ("finetune.cohort.classes", 1, "finetune.cohort.classes: input should be greater than or equal to 2, got 1"),
        ("finetune.grid.sizes", [6, 24], "grid.sizes: [24] are not in the cohort, which has [6, 12]"),
        ("finetune.grid.sizes", [], "finetune.grid.sizes: at least one value, and none twice, got []"),
        ("finetune.grid.lr", [1e-4, 0.0001], "grid.lr: at least one value, and none twice, got [0.0001, 0.0001]"),
        ("finetune.runs", 0, "finetune.runs: input should be greater than 0, got 0"),
        ("finetune.primary", 24, "finetune: primary: must be one of the grid's sizes [6, 12], got 24"),
        ("finetune.cohort.pool", "all.json", "or published 'splits', got ['pool', 'splits']"),
        ("finetune.cohort", {"root": "r", "classes": 2}, "with the 'sizes' to draw, or published 'splits', got []"),
        ("finetune.cohort", {"root": "r", "classes": 2, "pool": "p"}, "published 'splits', got ['pool']"),
        ("finetune.cohort.sizes", [6], "published 'splits', got ['sizes', 'splits']"),
        ("pretrain.pretrainings", 2, "pretrainings: must be 1 or as many as finetune.runs, as runs"),
        ("finetune.weights", ["a.pt", "b.pt"], "weights: must be as many files as pretrain.pretrainings, 1, got 2"),
        ("finetune.weights", ["a.pt", "a.pt"], "finetune.weights: at least one value, and none twice, got ['a"),
        ("finetune.grid.init", ["new"], "grid.init.0: input should be 'random', 'pretrained' or 'permuted', got 'new'"),
        ("finetune.grid.init", ["random", "permuted"], "permuted is a control beside the other two, got ['random', '"),
        ("finetune.encoder", {"freeze": -1}, "finetune.encoder.freeze: input should be 'none' or 'all', got -1"),
        ("finetune.encoder.freeze", True, "finetune.encoder.freeze: input should be 'none' or 'all', got 'true'"),
        ("finetune.runs", True, "finetune.runs: input should be a valid integer, unable to parse string as an int"),
        ("finetune.grid.lr", [True], "finetune.grid.lr.0: input should be a valid number, unable to parse string"),
        ("pretrain.patch_size", True, "patch_size.0: input should be a valid integer, unable to parse string"),
        ("pretrain.optimizer.clip_norm", True, "clip_norm: input should be a valid number, unable to parse string"),
        ("name", True, "name: input should be a valid string, got True"),
        ("finetune.encoder", {"layer_decay": 0}, "layer_decay: input should be greater than 0, got 0"),
        ("finetune.cohort.folds", 5, "folds: are of the subjects of a 'pool', which is not given, got 5"),
        ("finetune.cohort.folds", 2, "cohort.folds: input should be greater than or equal to 3, got 2"),
        ("pretrain.steps", 0, "pretrain.steps: input should be greater than 0, got 0"),
        ("pretrain.volumes", 1.5, "pretrain.volumes: input should be less than or equal to 1, got 1.5"),
        ("finetune.sliding_window_overlap", 1.0, "finetune.sliding_window_overlap: input should be less than 1, got"),
        ("network.num_heads", 7, "network: hidden_size must be a multiple of num_heads, got 768 and 7"),
        ("name", "a/b", "name: string should match pattern"),
        ("on_bad_volume", "ignore", "on_bad_volume: input should be 'fail' or 'skip', got 'ignore'"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named_with_place_and_value(file: Path, key: str, value: Any, rule: str) -> None:
    """Every rule that a study can break gives one line: the file, the place, the rule, the value."""
    message = refusal(change(file, key, value))
    assert rule in message
    assert message.startswith(f"{file}: ")


@pytest.mark.parametrize(("patches", "workers"), [(1, 1), (2, 2)])
def test_a_contrastive_loss_without_negatives_is_refused(file: Path, patches: int, workers: int) -> None:
    """One patch a worker has nothing to be told from: the loss would be 0 at every step."""
    change(change(file, "pretrain.batch_size", patches), "pretrain.workers", workers)
    assert "two patches a worker or more" in refusal(file, "pretrain.task.contrastive.enabled=true")
    assert load(file, ["pretrain.task.contrastive.enabled=true", f"pretrain.batch_size={2 * workers}"])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("hu_window: [-57, 164]", {"kind": "window", "hu_window": [-57, 164]}),
        ("normalise: {kind: window, hu_window: [-57, 164]}", {"kind": "window", "hu_window": [-57, 164]}),
        ("normalise: {hu_window: [-57, 164]}", {"kind": "window", "hu_window": [-57, 164]}),
        ("normalise: zscore", {"kind": "zscore", "over": "body"}),
        ("normalise: {kind: percentile}", {"kind": "percentile", "percentiles": [0.5, 99.5]}),
    ],
)
def test_a_short_form_is_the_long_one(file: Path, written: str, meant: dict[str, Any]) -> None:
    """The kind alone, or the window alone, stand for a section; what is kept of the study is the section."""
    file.write_text(STUDY.replace("hu_window: [-57, 164]", written))
    study = load(file)
    assert study.pretrain.preparation.normalise.model_dump(mode="json") == meant
    long = file.with_name("long.yaml")
    long.write_text(dump(study))
    assert load(long) == study
    assert "hu_window" not in flatten(study.pretrain.preparation)


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("normalise: {kind: zscore, ovr: all}", "preparation.normalise.ovr: unknown key; did you mean 'over'?"),
        ("normalise: {kind: zscore, percentiles: 5}", "normalise.percentiles: unknown key; valid keys: kind, over"),
        ("normalise: {kind: window}", "pretrain.preparation.normalise.hu_window: this key is required"),
        (
            "normalise: {kind: percentile, percentiles: [9, 3]}",
            "percentiles: they must ascend within 0 to 100",
        ),
        (
            "normalise: {kind: percentile, percentiles: [1]}",
            "normalise.percentiles.1: this key is required",
        ),
        (
            "normalise: zsore",
            "preparation.normalise: must be one of 'window', 'percentile', 'zscore'; did you mean 'zscore'?",
        ),
        ("normalise: 5", "pretrain.preparation.normalise: "),
        ("hu_window: 5", "pretrain.preparation.normalise.hu_window: "),
        ("hu_window: [5, 4]", "normalise.hu_window: the lower HU must be below the upper, got [5.0, 4.0]"),
        ("crop_foreground: true", "pretrain.preparation.normalise: this key is required"),
        ("hu_window: [0, 1], normalise: zscore", "pretrain.preparation: hu_window is short for normalise: only one"),
        ("hu_window: [0, 1], channels: 0", "preparation.channels: input should be greater than 0, got 0"),
        ("hu_window: [0, 1], channels: 2", "pretrain.preparation.channels: must be that of finetune.preparation"),
    ],
)
def test_a_wrong_normalisation_is_named_as_it_was_written(file: Path, written: str, rule: str) -> None:
    """Place and rule in one line: the kind, which is no key, is not in the place."""
    file.write_text(STUDY.replace("hu_window: [-57, 164]", written))
    message = refusal(file)
    assert rule in message
    assert len(message.splitlines()) == 1


def test_without_a_pretraining_their_number_does_not_matter(file: Path) -> None:
    """A study of three runs may begin with one from random weights."""
    several = "pretrain.pretrainings=3"
    assert not load(file, [several, "finetune.grid.init=[random]"]).pretrains
    given = "finetune.weights=[a.pt, b.pt, c.pt]"
    assert "must be 1 or as many as finetune.runs" in refusal(file, several, given)


def test_weights_from_elsewhere_may_have_other_channels(file: Path) -> None:
    """The study's own pretraining is not made, and its preparation not read."""
    options = ["finetune.preparation.channels=2", "finetune.weights=two.safetensors"]
    assert load(file, options).finetune.preparation.channels == 2


def test_a_wrong_item_is_not_also_reported_as_an_empty_list(file: Path) -> None:
    """A list of one wrong item gives one line."""
    assert len(refusal(change(file, "finetune.grid.lr", ["fast"])).splitlines()) == 1


def test_overrides_replace_and_add(file: Path) -> None:
    """`--set` reaches sections that the file has, sections that it has not, and keys that are numbers."""
    study = load(
        file,
        [
            "pretrain.epochs=7",
            "pretrain.optimizer.lr=2e-4",
            "finetune.grid.lr=[1e-3, 1e-4]",
            "finetune.cohort.splits.6=other.json",
            " seed = 5 ",
            "tracking.uri=null",
            "output=a=b",
        ],
    )
    assert (study.pretrain.epochs, study.pretrain.optimizer.lr, study.seed) == (7, 2e-4, 5)
    assert study.finetune.grid.lr == (1e-3, 1e-4)
    assert study.finetune.cohort.splits == {6: "other.json", 12: "twelve.json"}
    assert study.tracking.uri is None
    assert study.output == "a=b"


def test_overrides_reach_below_a_short_form_and_a_searched_key(tmp_path: Path) -> None:
    """`task: masked` has the keys of its kind, and a dotted key of the space is one name."""
    search = {"algorithm": "random", "space": {"finetune.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}}
    pretrain = {"patch_size": 32, "task": "masked"}
    tree = small_tree(network="primus", pretrain=pretrain, finetune={"patch_size": 32, "steps": 9}, search=search)
    given = [
        "pretrain.task.ratio=0.5",
        "network.token=16",
        "search.space.finetune.optimizer.lr={choice: [0.001]}",
        "search.space.finetune.steps.choice=[9, 12]",
        "search.space.size.choice=[2]",
        "search.space.init={choice: [random, pretrained]}",
    ]
    study = load(write_study(tmp_path / "short.yaml", tree), given)
    assert study.pretrain.task.model_dump(include={"kind", "ratio"}) == {"kind": "masked", "ratio": 0.5}
    assert study.network.model_dump(include={"kind", "token"}) == {"kind": "primus", "token": 16}
    assert study.search
    assert study.search.space["finetune.optimizer.lr"] == {"choice": (1e-3,)}
    assert study.search.space["finetune.steps"] == {"choice": (9, 12)}
    assert study.search.space["size"] == {"choice": (2,)}


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("pretrain.epochs", "expected key=value"),
        ("=5", "expected key=value"),
        ("name.first=5", "no such section, or no such place in a list"),
        ("pretrain.sources.0.root.deep=x", "no such section, or no such place in a list"),
        ("pretrain.epochs=[", "the value is not valid YAML"),
        ("pretrain.epochs=2024-13-45", "the value is not valid YAML"),
        ("pretrain.optimizer={lr: 1, lr: 2}", "the key 'lr' appears twice"),
        ("pretrain.epoch=5", "pretrain.epoch: unknown key; did you mean 'epochs'?"),
        ("pretrain.epochs=many", "pretrain.epochs: input should be a valid integer"),
        ("pretrain.workers=many", "pretrain.workers: input should be a valid integer"),
    ],
)
def test_a_wrong_override_is_named(file: Path, override: str, rule: str) -> None:
    """What is wrong with a `--set` is told with the override or the key that it led to."""
    message = refusal(file, override)
    assert rule in message
    assert override in message or str(file) in message


@pytest.mark.parametrize("text", ["1e-4", "'1e-4'", "1.0e-4", "0.0001"])
def test_exponents_without_a_point_are_numbers(file: Path, text: str) -> None:
    """YAML 1.1 reads `1e-4` as a string, a study as a number."""
    assert load(file, [f"pretrain.optimizer.lr={text}"]).pretrain.optimizer.lr == 1e-4
    assert load(file, [f"pretrain.preparation.spacing={text}"]).pretrain.preparation.spacing == (1e-4, 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("name: [", "not valid YAML"),
        ("name: 2024-13-45", "not valid YAML"),
        ("name: !!int ''", "not valid YAML"),
        ("name:\n\tx: 1\n", "not valid YAML"),
        ("name: *unknown", "not valid YAML"),
        ("name: !own 1", "not valid YAML"),
        ("name: !!bool perhaps", "not valid YAML"),
        (STUDY + "---\n" + STUDY, "not valid YAML"),
        ("? {a: b}\n: c", "not valid YAML"),
        ("name: \0", "not valid YAML"),
        ("!!python/object:os.system {}", "not valid YAML"),
        ("- name", "an experiment is a mapping of sections, got list"),
        ("name", "an experiment is a mapping of sections, got str"),
        ("", "an experiment is a mapping of sections, got NoneType"),
        (STUDY + "name: other\n", "not valid YAML: the key 'name' appears twice in"),
        (
            STUDY.replace("hu_window: [-57, 164]", "hu_window: [-57, 164], spacing: 3"),
            "the key 'spacing' appears twice in",
        ),
        (STUDY.replace("12: twelve.json", "'6': twelve.json"), "the key '6' appears twice in"),
        ("5: 6\n", "5: keys should be strings, got 5"),
        ("name: small\npretrain: yes\nfinetune: no\n", "pretrain: input should be a valid dictionary"),
        ("name:\npretrain:\nfinetune:\n", "name: input should be a valid string, got None"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(file: Path, text: str, rule: str) -> None:
    """Broken YAML, another top level and a key that appears twice are refused, naming the file, whatever is set."""
    file.write_text(text)
    for overrides in ((), ("seed=1",)):
        message = refusal(file, *overrides)
        assert rule in message
        assert message.startswith(f"{file}: ")


def test_yaml_anchors_and_merges_are_no_duplicates(file: Path) -> None:
    """A merged key may be overridden, as YAML has it."""
    file.write_text(
        STUDY.replace("pretrain:\n", "pretrain: &p\n  optimizer: &o {lr: 1e-3, warmup_steps: 5}\n")
        + "  optimizer:\n    <<: *o\n    lr: 1e-5\n"
    )
    study = load(file)
    assert (study.finetune.optimizer.lr, study.finetune.optimizer.warmup_steps) == (1e-5, 5)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, a folder and a file that is no text are refused, naming the file."""
    assert f"{tmp_path / 'no.yaml'}: cannot read the experiment: No such file" in refusal(tmp_path / "no.yaml")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert f"{tmp_path / 'binary.yaml'}: cannot read the experiment" in refusal(tmp_path / "binary.yaml")
    (tmp_path / "volume.nii").write_bytes(bytes(2 * 2**20))
    assert "2097152 bytes are more than" in refusal(tmp_path / "volume.nii")


def test_flatten_gives_dotted_keys_of_every_leaf(file: Path) -> None:
    """MLflow parameters are the leaves of the YAML under dotted keys."""
    study = load(file)
    flat = flatten(study)
    assert flat["pretrain.optimizer.lr"] == "0.0001"
    assert flat["finetune.cohort.splits.12"] == "twelve.json"
    assert flat["finetune.preparation.spacing"] == "[1.5, 1.5, 2.0]"
    assert flat["phantom"] == "None"
    assert flatten(study.network, "network.")["network.hidden_size"] == "768"
    leaves = yaml.safe_load(dump(study))
    for key, value in flat.items():
        node = leaves
        for part in key.split("."):
            node = node[part]
        assert str(node) == value


def test_paths_of_a_study_are_absolute(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study can be handed to processes that run elsewhere."""
    monkeypatch.chdir(tmp_path)
    study = load(file)
    assert folders_of(study).study == tmp_path / "output" / "small"
    assert folders_of(study).cache == tmp_path / "output" / "cache"
    assert tracker_of(study).uri == f"sqlite:///{tmp_path / 'output' / 'mlflow.db'}"
    assert folders_of(load(file, ["cache=/elsewhere"])).cache == Path("/elsewhere")


def test_sections_cannot_be_changed(file: Path) -> None:
    """A loaded study is a value."""
    with pytest.raises(ValueError, match="frozen"):
        load(file).seed = 3  # type: ignore[misc]


KEYS = st.text(max_size=5) | st.integers()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
SECTIONS = [(), ("pretrain",), ("finetune",), ("finetune", "cohort"), ("finetune", "grid"), ("pretrain", "sources")]


@given(
    VALUES,
    st.sampled_from(SECTIONS),
    st.sampled_from([*Study.model_fields, *Pretrain.model_fields, *Finetune.model_fields, *Preparation.model_fields]),
)
def test_any_value_anywhere_loads_or_is_refused(value: Any, section: tuple[str, ...], key: str) -> None:
    """Whatever stands in the file, the outcome is a study or a UserError that names the file."""
    tree: Any = yaml.safe_load(STUDY)
    node = tree
    for part in section[:-1]:
        node = node.setdefault(part, {})
    if section and section[-1] in node and isinstance(node[section[-1]], dict):
        node[section[-1]][key] = value
    else:
        node[section[-1] if section else key] = value
    try:
        parse(yaml.safe_dump(tree, allow_unicode=True), "study.yaml")
        message = ""
    except UserError as error:
        message = str(error)
    assert not message or message.startswith("study.yaml: ")


def test_set_reaches_into_lists(tmp_path: Path) -> None:
    """`pretrain.sources.0.root` is a place like any other; a place beyond the list is refused."""
    path = tmp_path / "study.yaml"
    path.write_text(dump(load(Path(__file__).parents[2] / "experiments" / "demo.yaml")))
    assert load(path, ["pretrain.sources.0.root=/elsewhere"]).pretrain.sources[0].root == "/elsewhere"
    for place in ("7", "first"):
        with pytest.raises(UserError, match=rf"sources.{place}.root=x: no such section, or no such place in a list"):
            load(path, [f"pretrain.sources.{place}.root=x"])


def test_the_recipe_is_to_the_number() -> None:
    """`tcia_btcv.yaml` against the table of the reference recipe (Project MONAI, vit_unetr_ssl)."""
    study = load(Path(__file__).parents[2] / "experiments" / "tcia_btcv.yaml")
    pretrain, finetune, network = study.pretrain, study.finetune, study.network
    assert (network.hidden_size, network.mlp_dim, network.num_heads, network.feature_size) == (768, 3072, 12, 16)
    assert (pretrain.preparation.spacing, pretrain.preparation.normalise.hu_window) == ((2, 2, 2), (-57, 164))
    assert (pretrain.patch_size, pretrain.patches_per_volume, pretrain.batch_size) == ((96, 96, 96), 2, 8)
    assert (pretrain.epochs, pretrain.validate_every, pretrain.task.contrastive.enabled) == (300, 2, False)
    assert (pretrain.optimizer.name, pretrain.optimizer.lr, pretrain.optimizer.schedule) == ("adam", 1e-4, "constant")
    assert (pretrain.optimizer.weight_decay, pretrain.optimizer.clip_norm) == (0, None)
    task = pretrain.task.corruption
    assert (task.inpaint_boxes, task.inpaint_size, task.outpaint_boxes, task.outpaint_size) == (6, (5, 32), 6, (20, 64))
    assert (task.shuffle_prob, task.shuffle_boxes, task.shuffle_size, task.outpaint_prob) == (0.8, 10, 8, 0.5)
    assert task.growing
    assert finetune.cohort.classes == 14
    assert finetune.preparation.orientation == "RAS"
    assert (finetune.preparation.spacing, finetune.preparation.normalise.hu_window) == ((1.5, 1.5, 2), (-175, 250))
    assert (finetune.patch_size, finetune.volumes_per_step, finetune.patches_per_volume) == ((96, 96, 96), 1, 4)
    augmentation = finetune.augmentation
    assert (augmentation.flip_prob, augmentation.flip_axes, augmentation.rotate_prob) == (0.1, (0, 1, 2), 0.1)
    assert (augmentation.shift, augmentation.shift_prob, finetune.foreground_prob) == (0.1, 0.5, 0.5)
    assert (finetune.steps, finetune.validate_every, finetune.sliding_window_batch) == (30_000, 100, 16)
    optimizer = finetune.optimizer
    assert (optimizer.name, optimizer.weight_decay, finetune.rates) == ("adamw", 1e-5, (1e-4,))
    assert optimizer.schedule == "constant"
    assert (finetune.loss.include_background, finetune.loss.batch, finetune.balance_organs) == (True, False, False)


def test_three_runs_of_the_recipe_are_the_recipe() -> None:
    """But for their name, their number, and a pretraining for each."""
    folder = EXPERIMENTS[0].parent
    recipe, runs = (load(folder / name) for name in ("tcia_btcv.yaml", "tcia_btcv_runs.yaml"))
    assert runs == load(
        folder / "tcia_btcv.yaml", ["name=tcia_btcv_runs", "finetune.runs=3", "pretrain.pretrainings=3"]
    )
    assert recipe.finetune.runs == recipe.pretrain.pretrainings == 1


@pytest.mark.parametrize("name", ["demo.yaml", "real_ct.yaml"])
def test_what_claims_something_has_three_runs_or_more(name: str) -> None:
    """With labelled volumes of its own in each."""
    config = load(EXPERIMENTS[0].parent / name).finetune
    assert config.runs >= 3
    assert config.cohort.pool
