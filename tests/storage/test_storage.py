"""Local folders and object stores behave alike; a fault of either is named in one line."""

import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from storage_worker import open_at_once, put_and_die
from volumes import PREPARATION, make_case, small_disk

from ssl_ray.data.nifti import read_label, read_nifti
from ssl_ray.data.normalise import prepare
from ssl_ray.data.patch import open_array, read_patch
from ssl_ray.data.prepare import known_volume, prepare_case, prepare_cohort
from ssl_ray.data.store import Store, Volume
from ssl_ray.errors import UserError
from ssl_ray.storage import object_store as storage
from ssl_ray.storage.files import appearing
from ssl_ray.storage.folders import Folders
from ssl_ray.storage.mirror import Mirror
from ssl_ray.storage.object_store import Place

NAMES = ("image", "label", "foreground")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint of an S3 server on the loopback."""
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


def client(endpoint: str) -> Any:
    import boto3

    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "secret"}
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)


@pytest.fixture
def uri(server: str) -> str:
    """A prefix in a new bucket; the credentials are in it, as Ray's workers have another environment."""
    bucket = f"bucket-{uuid.uuid4().hex}"
    client(server).create_bucket(Bucket=bucket)
    return f"s3://test:secret@{bucket}/some/prefix?region=us-east-1&endpoint_override={server}"


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place.parse(tmp_path / "place" if request.param == "local" else request.getfixturevalue("uri"))


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that not even root can write to."""
    with small_disk(tmp_path / "read_only", "ro,size=1m") as folder:
        yield folder


def test_what_is_written_is_read(place: Place) -> None:
    """A file comes back as it was last written, is listed with its size, and goes when removed."""
    file = place / "a folder/ä+b%20c #1?.bin"
    assert file.list() == place.list() == {}
    for content in (b"first", b"", os.urandom(1000)):
        file.write_bytes(content)
        assert file.read_bytes() == content
        assert place.list() == {"a folder/ä+b%20c #1?.bin": len(content)}
    assert file.list() == {".": 1000}
    file.remove()
    file.remove()
    assert file.list() == place.list() == {}


@pytest.mark.parametrize("links", [True, False])
def test_of_files_that_appear_at_once_the_first_stays(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the filesystem has hard links or not; nothing is left of the other one, nor of one that was not ended."""
    if not links:
        monkeypatch.setattr(os, "link", mock.Mock(side_effect=PermissionError))
    path = tmp_path / "file"
    with appearing(path, replace=False) as first, appearing(path, replace=False) as second:
        first.write_text("first")  # the inner one appears first
        second.write_text("second")
    with contextlib.suppress(KeyboardInterrupt), appearing(tmp_path / "other", replace=False) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"file": "second"}


def test_folders_go_up_down_and_elsewhere(place: Place, tmp_path: Path) -> None:
    """Uploaded, moved and downloaded, every file of a folder is the same, also one beyond a multipart upload's size."""
    source = tmp_path / "source"
    contents = {"a.bin": os.urandom(11 * 2**20), "deep/er/b.bin": b"b", "deep/empty.bin": b""}
    for name, content in contents.items():
        Place.parse(source / name).write_bytes(content)
    (place / "one").upload(source)
    (place / "one").move(place / "two")
    assert not (place / "one").list()
    (place / "two/a.bin").move(place / "three.bin")
    (place / "three.bin").move(place / "two/a.bin")
    for name in (place / "two").list():
        (place / "two" / name).download(tmp_path / "target" / name)
    found = {path.relative_to(tmp_path / "target").as_posix(): path for path in (tmp_path / "target").rglob("*.bin")}
    assert {name: path.read_bytes() for name, path in found.items()} == contents
    (place / "two").remove()
    assert place.list() == {}


def test_what_is_not_there_is_named(place: Place, tmp_path: Path) -> None:
    """A missing file is a FileNotFoundError in one line, and leaves nothing where it should have gone."""
    with pytest.raises(FileNotFoundError) as caught:
        (place / "none").read_bytes()
    assert str(caught.value) == f"{place}/none: No such file or directory"
    with pytest.raises(FileNotFoundError):
        (place / "none").download(tmp_path / "target" / "none")
    assert list((tmp_path / "target").iterdir()) == []


def test_a_download_that_does_not_match_leaves_what_was_there(place: Place, tmp_path: Path) -> None:
    """A file with another digest never takes the target's name."""
    (place / "file").write_bytes(b"content")
    target = tmp_path / "target"
    target.write_bytes(b"before")
    with pytest.raises(OSError, match="does not match its digest"):
        (place / "file").download(target, "0" * 64)
    assert target.read_bytes() == b"before"
    (place / "file").download(target, (place / "file").sha256())
    assert target.read_bytes() == b"content"
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local file is replaced whole or not at all."""
    file = Place.parse(tmp_path / "file")
    file.write_bytes(b"before")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="file: No space left on device"):
        file.write_bytes(b"after")
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_is_cheap_to_send_and_keeps_its_secrets(uri: str) -> None:
    """Only its URI is pickled, also after use; its text is without credentials and parameters."""
    place = Place.parse(uri)
    place.list()
    assert pickle.loads(pickle.dumps(place)) == place
    assert len(pickle.dumps(place)) < 300
    assert str(place).startswith("s3://bucket-")
    assert str(place).endswith("/some/prefix")


def test_a_uri_names_its_place(uri: str) -> None:
    """A place goes through its URI and back, whatever characters are in a name; a file is listed as itself."""
    place = Place.parse(uri) / "a folder/ä+b%20c #1?.bin"
    assert Place.parse(place.uri) == place
    assert Place.parse(f"{uri.partition('?')[0]}/?{uri.partition('?')[2]}") == Place.parse(uri)
    place.write_bytes(b"content")
    assert Place.parse(place.uri).list() == {".": 7}


def test_local_copies_of_two_stores_lie_apart(tmp_path: Path) -> None:
    """Another bucket, prefix or server has another folder; other credentials for the same have the same."""
    uri = "s3://key:secret@bucket/prefix?endpoint_override=http://one"
    others = [uri.replace(*change) for change in (("bucket", "basket"), ("prefix", "prefixes"), ("one", "two"))]
    folders = {Mirror.of(text, tmp_path).folder for text in (uri, *others)}
    assert len(folders) == 4
    assert Mirror.of(uri.replace("key:secret@", ""), tmp_path).folder == Mirror.of(uri, tmp_path).folder
    assert Store(uri, tmp_path).folder not in folders, "prepared volumes and output lie apart as well"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host/folder", "ftp://host/folder: must be a local path or s3://bucket/prefix"),
        ("s3:///prefix", "s3:///prefix: must be"),
        ("s3://key:sec/ret@bucket/prefix", "s3://: a slash in user or password must be percent-encoded"),
        (
            "s3://bucket/prefix?regoin=x",
            "s3://bucket/prefix regoin: must be a local path or s3://bucket",
        ),
    ],
)
def test_a_wrong_uri_is_refused(text: str, message: str) -> None:
    """Scheme, bucket and parameters are checked without any request."""
    with pytest.raises(ValueError, match="s3://") as caught:
        Place.parse(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "text", ["s3://key:se%cret@bucket/prefix", "s3://key:secret@bucket/prefix?scheme=ftp&region=x"]
)
def test_credentials_that_cannot_be_read_are_not_told(text: str) -> None:
    """A password that is not percent-encoded ends in a rule, not in a message with the URI."""
    with pytest.raises(UserError, match=r"s3://bucket: .*percent-encoded") as caught:
        Place.parse(text).list()
    assert "cret" not in str(caught.value)


def test_nothing_that_ray_keeps_of_an_output_has_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune pickles the filesystem into the output: a password in its URI is refused, the environment's stays out."""
    with pytest.raises(UserError, match=r"^output: Ray would write user and password .* AWS_SECRET_ACCESS_KEY$"):
        Folders.of("x", "s3://me:hunter@bucket/x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter")
    folders = Folders.of("x", "s3://bucket/x?region=here", "s3://me:hunter@bucket/cache", "/scratch")
    assert b"hunter" not in pickle.dumps(folders.ray_storage)


@pytest.mark.parametrize(
    ("output", "cache", "key"),
    [("gs://b/x", None, "output"), ("out", "gs://b/x", "cache"), ("s3://me:hunter@[x", None, "output")],
)
def test_a_place_that_is_none_of_ours_is_named_with_its_key(output: str, cache: str | None, key: str) -> None:
    """The message begins with the key of the experiment."""
    with pytest.raises(UserError, match=f"^{key}: "):
        Folders.of("study", output, cache)


@pytest.mark.parametrize(
    ("name", "cache"),
    [("artifacts", None), ("Cache", None), ("mlflow.db", None), ("lung", "out/lung"), ("lung", "out/../out/lung/")],
)
def test_a_study_has_no_folder_that_others_share(name: str, cache: str | None) -> None:
    """`--fresh` would move it away for all of them."""
    with pytest.raises(UserError, match=r"^name: .* give it another name, got"):
        Folders.of(name, "out", cache)


def test_the_environment_fills_in_what_the_uri_leaves_out(
    server: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endpoint, credentials and region may come from the variables that the AWS tools read."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bare = Place.parse(str(Place.parse(uri)))
    bare.check_writable()
    (bare / "file").write_bytes(b"x")
    assert (Place.parse(uri) / "file").read_bytes() == b"x"


def test_a_writable_place_is_left_as_it_was(place: Place) -> None:
    """The probe is removed again."""
    place.check_writable()
    assert place.list() == {}


def refuse(endpoint: str, uri: str, action: str) -> None:
    bucket = Place.parse(uri).path.partition("/")[0]
    rule = {"Effect": "Deny", "Principal": "*", "Action": action, "Resource": f"arn:aws:s3:::{bucket}/*"}
    policy = {"Version": "2012-10-17", "Statement": [rule]}
    client(endpoint).put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))


def refusal(place: Place) -> str:
    """What `check_writable` says, which must be one line that names the place and no secret."""
    with pytest.raises(ValueError, match="cannot be written to") as caught:
        place.check_writable()
    text = str(caught.value)
    assert text.startswith(f"{place}: cannot be written to: ")
    assert "\n" not in text
    assert len(text) < 300
    assert "secret" not in text
    return text.removeprefix(f"{place}: cannot be written to: ")


@pytest.mark.slow
def test_an_object_store_that_cannot_be_written_to_is_named(server: str, uri: str, closed_port: int) -> None:
    """A bucket that is missing, one without permission and a server that is gone each have their reason."""
    place = Place.parse(uri)
    assert refusal(Place.parse(uri.replace("bucket-", "none-"))).startswith("NO_SUCH_BUCKET during PutObject")
    gone = Place.parse(f"s3://test:secret@bucket/x?region=us-east-1&endpoint_override=http://127.0.0.1:{closed_port}")
    assert "NETWORK_CONNECTION during PutObject operation: curlCode: 7, " in (text := refusal(gone))
    assert f"Failed to connect to 127.0.0.1 port {closed_port}" in text
    refuse(server, uri, "s3:PutObject")
    assert refusal(place).startswith("ACCESS_DENIED during PutObject")


def test_a_read_only_folder_is_named(read_only: Path) -> None:
    """Before anything starts."""
    assert refusal(Place.parse(read_only / "output")) == "Read-only file system"


def test_a_path_below_a_file_is_named(tmp_path: Path) -> None:
    """It can be no folder."""
    (tmp_path / "file").touch()
    assert refusal(Place.parse(tmp_path / "file" / "output")) == "Not a directory"


def files_of(store: Store, volume: Volume) -> dict[str, Any]:
    return {name: np.array(open_array(store, volume.key, name)) for name in NAMES}  # type: ignore[arg-type]


@pytest.mark.usefixtures("ray_cluster")
def test_a_cohort_in_an_object_store_is_the_same_as_in_a_folder(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifests, arrays and patches are equal, nothing is prepared twice, and what was read needs no server."""
    cases = [make_case(tmp_path, f"case{seed}", seed) for seed in range(3)]
    near, far = Store(tmp_path / "near"), Store(uri, tmp_path / "scratch")
    expected = {str(case.image): prepare_case(case, PREPARATION, near)[0] for case in cases}
    volumes, bad, fresh = prepare_cohort(cases, PREPARATION, far)
    assert (volumes, bad, fresh) == (expected, [], 3)
    assert prepare_cohort(cases, PREPARATION, far, verify=True) == (volumes, [], 0)
    stored = arrays_in(uri)
    assert sorted(stored) == sorted(path.relative_to(near.folder).as_posix() for path in near.folder.glob("*/*/*"))
    assert not list((tmp_path / "scratch").rglob("*.npy")), "the mirror has only what was read"
    for volume in volumes.values():
        for name, array in files_of(far, volume).items():
            np.testing.assert_array_equal(array, open_array(near, volume.key, name))  # type: ignore[arg-type]
        array = open_array(far, volume.key)
        assert isinstance(array, np.memmap)
        patch = read_patch(array, (1, 0, 2), (3, 9, 2))
        np.testing.assert_array_equal(patch, read_patch(open_array(near, volume.key), (1, 0, 2), (3, 9, 2)))

    def unreachable(*_: Any) -> Any:
        raise AssertionError("asked the object store for what the mirror has")

    monkeypatch.setattr(storage, "_s3", unreachable)
    open_array.cache_clear()
    for volume in volumes.values():
        files_of(far, volume)


def arrays_in(uri: str) -> list[str]:
    """Files of a store, without what it remembers of sources that were not written a moment ago."""
    return [name for name in Place.parse(uri).list() if not name.startswith("sources/")]


def test_sources_that_one_machine_has_read_are_known_to_all(uri: str, tmp_path: Path) -> None:
    """By the store itself: a machine's own disk is not asked what was read where the volume was prepared."""
    case = make_case(tmp_path)
    for path in filter(None, (case.image, case.label)):
        os.utime(path, (1e9, 1e9))
    volume, _ = prepare_case(case, PREPARATION, Store(uri, tmp_path / "one"))
    assert known_volume(case, PREPARATION, Store(uri, tmp_path / "another")) == volume


def test_a_uri_alone_opens_arrays(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror is then in the user's own folder among the temporary files, which nobody else can read."""
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    volume, _ = prepare_case(make_case(tmp_path), PREPARATION, Store(uri))
    assert open_array(Store(uri), volume.key).shape == volume.shape
    (own,) = tmp_path.glob("ssl_ray-*")
    assert own.stat().st_mode & 0o777 == 0o700


def test_nobody_else_gets_at_the_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a link that they have made there, nor where the folder was open before."""
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    (mine := tmp_path / "public").mkdir()
    scratch = tmp_path / f"ssl_ray-{os.getuid()}"
    scratch.symlink_to(mine)
    with pytest.raises(UserError, match="is a link or belongs to another user; name another folder in `scratch`, or"):
        storage.default_scratch()
    scratch.unlink()
    scratch.mkdir(mode=0o755)
    assert storage.default_scratch().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("survive", [1, 3])
def test_an_upload_that_was_killed_is_invisible_and_healed(uri: str, tmp_path: Path, survive: int) -> None:
    """Without its manifest a volume does not exist, however much of it is there."""
    case, store = make_case(tmp_path), Store(uri, tmp_path / "scratch")
    assert case.label
    prepared = prepare(read_nifti(case.image), read_label(case.label), PREPARATION)
    expected, _ = prepare_case(case, PREPARATION, Store(tmp_path / "near"))
    arguments = (store, expected, prepared, survive)
    process = multiprocessing.get_context("spawn").Process(target=put_and_die, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert len(arrays_in(uri)) == survive
    assert store.get(expected.key) is None
    assert prepare_case(case, PREPARATION, store) == (expected, True)
    assert store.get(expected.key, verify=True) == expected
    assert len(arrays_in(uri)) == 4


def test_processes_fill_the_mirror_at_once(uri: str, tmp_path: Path) -> None:
    """All of them read the stored arrays, and no unfinished file is left."""
    store = Store(uri, tmp_path / "scratch")
    volume, _ = prepare_case(make_case(tmp_path), PREPARATION, store)
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    runs = [context.Process(target=open_at_once, args=(store, volume.key, NAMES, start, answers)) for _ in range(2)]
    for run in runs:
        run.start()
    first, second = answers.get(timeout=60), answers.get(timeout=60)
    for run in runs:
        run.join()
    assert first == second == {name: array.tobytes() for name, array in files_of(store, volume).items()}
    assert sorted(path.name for path in store.path(volume.key).iterdir()) == sorted(f"{name}.npy" for name in NAMES)


def flip(place: Place) -> None:
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(bytes(content))


def test_damage_in_the_object_store_is_never_trained_on(uri: str, tmp_path: Path) -> None:
    """A deleted or cut object is prepared again, an altered one is refused and, after `verify`, prepared again."""
    store, case = Store(uri, tmp_path / "scratch"), make_case(tmp_path)
    volume, _ = prepare_case(case, PREPARATION, store)
    home = Place.parse(uri) / f"{volume.key[:2]}/{volume.key}"
    image = home / "image.npy"
    image.remove()
    assert prepare_case(case, PREPARATION, store) == (volume, True)
    image.write_bytes(image.read_bytes()[:-1])
    assert prepare_case(case, PREPARATION, store) == (volume, True)
    (home / "manifest.json").write_bytes(b'{"key": 1')
    assert prepare_case(case, PREPARATION, store) == (volume, True)
    flip(image)
    assert prepare_case(case, PREPARATION, store) == (volume, False)
    with pytest.raises(OSError, match=r"image\.npy: does not match its digest"):
        open_array(store, volume.key)
    assert prepare_case(case, PREPARATION, store, verify=True) == (volume, True)
    assert open_array(store, volume.key).shape == volume.shape


def test_damage_in_the_mirror_is_mended(uri: str, tmp_path: Path) -> None:
    """A file that is torn, missing or altered is fetched again after `verify`."""
    store, case = Store(uri, tmp_path / "scratch"), make_case(tmp_path)
    volume, _ = prepare_case(case, PREPARATION, store)
    expected, path = np.array(open_array(store, volume.key)), store.path(volume.key, "image.npy")
    for damage in (lambda: path.write_bytes(b"x"), path.unlink, lambda: flip(Place.parse(path))):
        damage()
        assert prepare_case(case, PREPARATION, store, verify=True) == (volume, False)
        open_array.cache_clear()
        np.testing.assert_array_equal(open_array(store, volume.key), expected)


@pytest.mark.slow
def test_a_server_that_is_gone_is_named(uri: str, tmp_path: Path) -> None:
    """Preparing and reading end with one line; when it is back, what was stored is there."""
    case, moto = make_case(tmp_path), pytest.importorskip("moto.server")
    other = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)  # serves what the first one does
    other.start()
    host, port = other.get_host_and_port()
    store = Store(f"{uri.partition('endpoint_override')[0]}endpoint_override=http://{host}:{port}", tmp_path / "one")
    volume, _ = prepare_case(case, PREPARATION, store)
    other.stop()
    message = rf"^s3://bucket-\S*: NETWORK_CONNECTION[^\n]* Failed to connect to 127.0.0.1 port {port}[^\n]*$"
    with pytest.raises(OSError, match=message):
        open_array(store, volume.key)
    with pytest.raises(OSError, match=message):
        prepare_case(case, PREPARATION, store)
    assert Store(uri, tmp_path / "two").get(volume.key) == volume
