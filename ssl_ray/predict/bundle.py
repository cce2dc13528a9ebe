"""A model as a MONAI bundle: MONAI alone reads a scan, prepares it, segments it and writes labels on the scan's grid.

    configs/metadata.json     what goes in and comes out, by MONAI's schema, and all that the model file says
    configs/inference.json    the preparation and the sliding windows that the model was scored with
    models/model.pt           its state dict
    docs/README.md            the model card
    scripts/                  our source of what MONAI lacks: a network, a normalisation that measures the scan

Its labels are those of `ssl-ray predict`, but for voxels whose two best classes are equal up to rounding.
"""

import json
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from monai.networks import nets
from torch import Tensor, nn

from ssl_ray.data.resample import AXIS_CODES, ROUNDED
from ssl_ray.evaluate.metrics import MIDDLE
from ssl_ray.networks.model_file import Metadata
from ssl_ray.networks.registry import module_of
from ssl_ray.predict.card import TEMPLATES, model_card
from ssl_ray.predict.model import Model
from ssl_ray.storage.files import appearing, write_file


def write_bundle(model: Model, folder: Path, authors: str) -> None:
    """Write the bundle into a folder, the metadata last."""
    told = model.metadata
    network, network_modules = _network(told)
    before, after, normalise_modules = _normalisation(told)
    modules = network_modules + normalise_modules
    (folder / "models").mkdir(parents=True)
    with appearing(folder / "models" / "model.pt") as part:
        torch.save(_monai_state(model.network, told), part)
    if modules:
        _carry(modules, folder)
    write_file(folder / "docs" / "README.md", model_card(model, folder.resolve().name, authors, bool(modules)).encode())
    configs = {"inference": _inference(told, network, before, after)}
    configs["metadata"] = _literal(_metadata(told, authors, ["pydantic"] if modules else []))
    for name, tree in configs.items():
        write_file(folder / "configs" / f"{name}.json", f"{json.dumps(tree, indent=4)}\n".encode())


def _network(told: Metadata) -> tuple[dict[str, Any], list[str]]:
    """The network as MONAI's configuration builds it, and our modules that it needs."""
    if found := _monai(told):
        return {"_target_": found[0], **found[1]}, []
    settings, modules = _settings("networks", told.network)
    shapes = {"patch_size": told.patch_size, "channels": told.preparation.channels, "classes": told.classes}
    modules.append(f"ssl_ray.networks.{told.network.kind}.network")
    build = f"{_carried(modules[-1])}.build_segmentation"
    return {"_target_": build, "network": settings, **shapes}, modules


def _monai(told: Metadata) -> tuple[str, dict[str, Any]] | None:
    """The class of `monai.networks.nets` that is the same network, and its arguments; None: of none."""
    module = module_of(told.network)
    if not hasattr(module, "MONAI_CLASS"):
        return None
    shapes = told.patch_size, told.preparation.channels, told.classes
    return module.MONAI_CLASS, module.monai_options(told.network, *shapes)


def _settings(room: str, settings: Any) -> tuple[dict[str, Any], list[str]]:
    """A section of settings as MONAI's configuration builds it, and its module."""
    module = f"ssl_ray.{room}.{settings.kind}.settings"
    target = f"{_carried(module)}.{type(settings).__name__}"
    return {"_target_": target, **settings.model_dump(mode="json")}, [module]


def _monai_state(network: nn.Module, told: Metadata) -> dict[str, Tensor]:
    """The weights under all names that the bundle's network has for them: MONAI's DynUNet has two for most."""
    state: dict[str, Tensor] = network.state_dict()
    if not (found := _monai(told)):
        return state
    plain: nn.Module = getattr(nets, found[0])(**found[1])
    plain.load_state_dict(state, strict=False)
    named = plain.state_dict(keep_vars=True)
    given = {id(named[name]) for name in state}
    assert all(id(weight) in given for weight in named.values()), "MONAI's class has weights that ours has not"
    return plain.state_dict()  # type: ignore[no-any-return]


def _normalisation(told: Metadata) -> tuple[list[Any], list[Any], list[str]]:
    """Transforms of the scan as it was read, those of the resampled one, and our modules that they need."""
    normalise, crop = told.preparation.normalise, told.preparation.crop_foreground
    if normalise.kind == "window":
        (low, high), levels = normalise.hu_window, normalise.storage.levels
        ends = {"a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0, "clip": True}
        cropped = [_image("CropForegroundd", source_key="image")] if crop else []
        as_stored = _image("Lambdad", func=f"$lambda image: torch.round(image * {levels}) / {levels}")
        return [], [_image("ScaleIntensityRanged", **ends), *cropped, as_stored], []
    settings, modules = _settings("data.normalisations", normalise)
    modules += [f"ssl_ray.data.normalisations.{normalise.kind}.normalisation", "ssl_ray.predict.transforms"]
    ours = _carried(modules[-1])
    measured = _image(f"{ours}.MeasureIntensitiesd", settings=settings)
    return [measured], [_image(f"{ours}.ApplyIntensitiesd", settings=settings, crop=crop)], modules


def _image(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, "keys": "image", **arguments}


def _inference(told: Metadata, network: dict[str, Any], before: list[Any], after: list[Any]) -> dict[str, Any]:
    """`configs/inference.json`; `before` and `after` are transforms around the resampling."""
    tree, prepared, used = _template("inference.json"), told.preparation, told.inference
    tree["datalist"] = "$sorted(glob.glob(@dataset_dir + '/*.nii*'))"
    if prepared.channels > 1:  # named as nnU-Net does
        every = f"[one.replace('_0000.nii', '_%04d.nii' % number) for number in range({prepared.channels})]"
        tree["datalist"] = f"$[{every} for one in sorted(glob.glob(@dataset_dir + '/*_0000.nii*'))]"
    turned = [_image("Orientationd", axcodes=prepared.orientation, labels=AXIS_CODES)] if prepared.orientation else []
    resampled = _image("Spacingd", pixdim=prepared.spacing, mode="bilinear")
    why = "A rotation that the header rounded becomes one again: Spacing would lay the grid of another elsewhere."
    func = "$lambda image: image.meta.update(affine=@right_angled(image.affine)) or image"
    straight = _image("Lambdad", _desc_=why, func=func)
    read = [_image("LoadImaged"), _image("EnsureChannelFirstd"), straight]
    tree["preprocessing"]["transforms"] = [*read, *before, *turned, resampled, *after]
    tree["network_def"], tree["middle"], tree["rounded"] = network, MIDDLE, ROUNDED
    windows = {"roi_size": told.patch_size, "sw_batch_size": used.batch, "overlap": used.overlap}
    tree["inferer"] = {"_target_": "SlidingWindowInferer", **windows, "mode": used.weighting}
    tree["evaluator"]["amp"] = "$@device.type == 'cuda'" if used.precision == "bfloat16" else False
    return tree


def _metadata(told: Metadata, authors: str, packages: list[str]) -> dict[str, Any]:
    """`configs/metadata.json`, with the keys of MONAI's schema, and the model's own metadata as `ssl_ray`."""
    tree = _template("metadata.json")
    needed = ["nibabel", "pytorch-ignite", *packages, *(["einops"] if told.network.kind == "unetr" else [])]
    tree["required_packages_version"] = {name: version(name) for name in needed}
    for key, package in (("monai", "monai"), ("pytorch", "torch"), ("numpy", "numpy")):
        tree[f"{key}_version"] = version(package).partition("+")[0]
    tree |= {"authors": authors, "copyright": f"Copyright (c) {authors}"} if authors else {}
    tree["task"] = f"Segmentation of {', '.join(told.organs)}"
    tree["eval_metrics"] = told.scores.get("test") or told.scores.get("validation", {})
    prepared = told.preparation
    kind = ("hounsfield", "CT") if prepared.normalise.kind == "window" else ("magnitude", "n/a")
    image = {"format": kind[0], "modality": kind[1], "value_range": prepared.normalise.storage.ends}
    classes = ["background", *told.organs]
    tree["network_data_format"] = {
        "inputs": {"image": _tensor(told, [f"channel {n} of the scan" for n in range(prepared.channels)]) | image},
        "outputs": {"pred": _tensor(told, classes) | {"format": "segmentation", "value_range": []}},
    }
    tree["ssl_ray"] = told.model_dump(mode="json")
    return tree


def _tensor(told: Metadata, channels: list[str]) -> dict[str, Any]:
    shape = {"num_channels": len(channels), "spatial_shape": told.patch_size, "channel_def": dict(enumerate(channels))}
    return {"type": "image", "dtype": "float32", "is_patch_data": True, **shape}


def _template(name: str) -> dict[str, Any]:
    return dict(json.loads(TEMPLATES.get_template(name).render()))


def _literal(tree: Any) -> Any:
    """The tree, with a blank before every text that MONAI would run as code, such as the name of an organ."""
    if isinstance(tree, dict):
        return {key: _literal(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_literal(value) for value in tree]
    return f" {tree}" if isinstance(tree, str) and tree.startswith(("$", "@", "%")) else tree


def _carried(module: str) -> str:
    """What a module of ours is called in a bundle, whose own code MONAI can import as the package `scripts`."""
    return f"scripts{module.removeprefix('ssl_ray')}"


def _carry(modules: list[str], folder: Path) -> None:
    """Copy modules of ours, all others of ours that they import, and their packages, into a bundle's folder."""
    todo, done = set(modules), set[str]()
    while todo:
        module = todo.pop()
        done.add(module)
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text()
        todo |= {module.rpartition(".")[0], *re.findall(r"^\s*from (ssl_ray[\w.]*) import", source, re.M)} - {*done, ""}
        path = folder.joinpath(*_carried(module).split("."))
        path = path / "__init__.py" if spec.submodule_search_locations else path.with_suffix(".py")
        write_file(path, re.sub(r"\bssl_ray\.", "scripts.", source).encode())
