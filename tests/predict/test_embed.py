"""Features of whole volumes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from shaking import shaken
from tiny_model import NETWORK, PATCH, PREPARATION, write_model
from volumes import oblique_affine, smooth_ct, write_nifti

from ssl_ray.data.datalist import Case
from ssl_ray.data.normalise import metadata as preparation_metadata
from ssl_ray.errors import UserError
from ssl_ray.networks.dynunet.settings import DynUnet
from ssl_ray.networks.primus.settings import Primus
from ssl_ray.networks.registry import build_autoencoder
from ssl_ray.networks.unetr.settings import Unetr
from ssl_ray.networks.weight_files import describe, export
from ssl_ray.predict.embed import read_embedder, write_features
from ssl_ray.predict.inputs import read_prepared

AFFINE = oblique_affine((2.2, 2.6, 4.1), 25, flip=True)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = tmp_path_factory.mktemp("scans") / "scan.nii.gz"
    return Case("scan", write_nifti(path, smooth_ct((31, 26, 17)), AFFINE))


def test_tokens_are_the_encoders(tmp_path: Path, case: Case) -> None:
    """Each token is what the encoder makes of its patch, in a volume that lies in the middle of whole patches."""
    model = write_model(tmp_path, patch_size=(32, 16, 16))
    embedder, _ = read_embedder(str(tmp_path))
    tokens, (prepared, _) = embedder(case), read_prepared(case, PREPARATION)
    image = prepared.image
    missing = [-length % side for length, side in zip(image.shape, (32, 16, 16), strict=True)]
    before = [extra // 2 for extra in missing]
    padded = np.pad(image, [(low, extra - low) for low, extra in zip(before, missing, strict=True)])
    encoder = model.network.eval().encoder
    assert tokens.features.shape == (len(tokens.places), 48)
    assert len({tuple(place) for place in tokens.places}) == len(tokens.places)
    for feature, place, centre in zip(tokens.features, tokens.places, tokens.centres, strict=True):
        start = [int(index) * 16 // side * side for index, side in zip(place, (32, 16, 16), strict=True)]
        patch = padded[tuple(slice(a, a + side) for a, side in zip(start, (32, 16, 16), strict=True))]
        with torch.no_grad():
            made = encoder.encode(encoder.embed(torch.from_numpy(patch).float()[None, None] / prepared.levels))[0]
        np.testing.assert_allclose(feature, made[int(place[0]) % 2], atol=1e-4)
        middle = place * 16 + 7.5 - before
        np.testing.assert_allclose(centre, apply_affine(prepared.affine, middle))
        assert all(-8 <= at < length + 8 for at, length in zip(middle, image.shape, strict=True)), "reaches inside"


PRIMUS = Primus(token=4, hidden_size=48, layers=2, num_heads=4)


@pytest.mark.parametrize("network", [NETWORK, PRIMUS], ids=["unetr", "primus"])
def test_a_pretraining_tells_what_its_encoder_needs(tmp_path: Path, case: Case, network: Unetr | Primus) -> None:
    """Its best weights give the same features as the network that wrote them; without metadata they are refused."""
    autoencoder = shaken(build_autoencoder(network, PATCH), 0.1)
    told = describe(network, PATCH) | preparation_metadata(PREPARATION) | {"task": "restoration", "step": "4"}
    export(tmp_path / "best.safetensors", autoencoder.state_dict(), told)
    embedder, path = read_embedder(str(tmp_path))
    assert path == tmp_path / "best.safetensors"
    assert embedder.preparation == PREPARATION
    with torch.no_grad():
        image = torch.rand(1, 1, *PATCH)
        expected = autoencoder.encode(autoencoder.embed(image))
        assert torch.equal(embedder.encoder.encode(embedder.encoder.embed(image)), expected)
    assert np.isfinite(embedder(case).features).all()
    export(tmp_path / "best.safetensors", autoencoder.state_dict(), {})
    with pytest.raises(UserError, match="metadata do not say which encoder it is"):
        read_embedder(str(tmp_path))


def test_a_network_without_encoder_is_refused(tmp_path: Path) -> None:
    """With its kind."""
    write_model(tmp_path, network=DynUnet(filters=(4, 8, 8)), patch_size=(16, 16, 16))
    with pytest.raises(UserError, match="a dynunet has no encoder"):
        read_embedder(str(tmp_path))


def test_only_a_table_of_features_is_replaced(tmp_path: Path) -> None:
    """A scan that was given as the output, with the arguments exchanged, stays as it is, and nothing is computed."""
    scan, table = tmp_path / "scan.nii.gz", tmp_path / "features.parquet"
    scan.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"scan\.nii\.gz: is there already, and is no Parquet file"):
        write_features((pytest.fail("computed") for _ in range(1)), "digest", scan, tokens=False)
    assert scan.read_bytes() == b"precious"
    for _ in range(2):
        assert write_features([], "digest", table, tokens=False) == (0, {})
