"""What the environment says about Ray is checked before Ray is asked."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray._private import services
from ray._private.ray_logging import global_worker_stdstream_dispatcher as printed
from ray.dashboard import utils

from ssl_ray.cluster import connect as module
from ssl_ray.cluster import worker
from ssl_ray.cluster.connect import check_address, connect
from ssl_ray.cluster.private import leave_out_actors, leave_out_harmless_lines
from ssl_ray.cluster.worker import set_up_worker
from ssl_ray.config.schema import LocalCluster
from ssl_ray.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.5)


@pytest.fixture(params=[b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"", None])
def other(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a server that is not Ray: of the web, of SSH, one that hangs up, one that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            held = []
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return
                if request.param is not None:
                    held[-1].sendall(request.param)
                    held[-1].close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def drive(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a driver, in a folder and with more in its environment, that joins no cluster but starts a Ray of its own."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "RAY_ADDRESS": "", **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_dead_address_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for eleven minutes; it is not even asked."""
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("asked Ray"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    address = f"127.0.0.1:{closed_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"^RAY_ADDRESS: no Ray answers at '{address}'"):
        connect(LocalCluster())
    assert time.monotonic() - begin < 2


def test_the_port_of_something_else_is_no_ray(other: int) -> None:
    """What answers must begin as a server of gRPC does."""
    with pytest.raises(UserError, match=rf"RAY_ADDRESS: no Ray answers at '127\.0\.0\.1:{other}'"):
        check_address(f"127.0.0.1:{other}")


def test_a_server_of_grpc_answers() -> None:
    """The words of the check are those of gRPC, here of its own server."""
    grpc = pytest.importorskip("grpc")
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    check_address(f"127.0.0.1:{port}")
    server.stop(None)


@pytest.mark.parametrize("named", ["http://head:8265", "head", "head:port", "host:123456"])
def test_what_is_no_address_is_told_the_form(named: str) -> None:
    """E.g. the address of the job server, which `ray job submit` takes."""
    with pytest.raises(UserError, match=rf"RAY_ADDRESS: .* at '{named}'; must be host:port, auto or local"):
        check_address(named)


def test_an_address_of_rays_client_is_told_what_to_do_instead() -> None:
    """`ray.init` would end with a TypeError, as a client sets up no worker processes."""
    with pytest.raises(UserError, match=r"RAY_ADDRESS: 'ray://head:10001': .*`ray job submit`, or say host:port"):
        check_address("ray://head:10001")


def test_gloo_meets_other_workers_on_the_network_of_their_cluster() -> None:
    """The interface of a node's address; loopback is left to gloo, and so is an address that no interface has."""
    card = {"eth0": [SimpleNamespace(address="10.0.0.7")], "lo": [SimpleNamespace(address="127.0.0.1")]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psutil.net_if_addrs", lambda: card)
        found = [worker._interface_of(address) for address in ("10.0.0.7", "127.0.0.1", "10.0.0.8")]
    assert found == ["eth0", None, None]


def test_auto_without_a_cluster_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that was found, but is dead, is named."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: frozenset())
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    with pytest.raises(UserError, match="RAY_ADDRESS: no Ray answers at 'auto'"):
        check_address("auto")
    stale = f"127.0.0.1:{closed_port()}"
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: stale)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS: no Ray answers at '[\d.]+:{stale[10:]}'"):
        check_address("auto")


def test_a_long_temporary_folder_is_named(tmp_path: Path) -> None:
    """Ray looks at the names of its sockets before it starts any process."""
    folder = tmp_path / ("x" * 100)
    code = "from ssl_ray.cluster import connect; connect.connect(connect.LocalCluster())"
    done = drive(code, RAY_TMPDIR=str(folder))
    assert re.search(rf"UserError: Ray .* cannot exceed \d+ bytes: {folder}/ray/.*RAY_TMPDIR", done.stderr)
    assert not list(folder.glob("ray/session_*/logs/gcs_server*"))


def test_a_worker_knows_its_cluster_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors of Ray's own that ask for the state of their cluster ask that one, whatever else runs on the machine."""
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: frozenset({"127.0.0.1:1", "127.0.0.1:2"}))
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    monkeypatch.setattr(utils, "ray_address_to_api_server_url", services.canonicalize_bootstrap_address_or_die)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.7:6379"))
    monkeypatch.setenv("RAY_ADDRESS", "")
    with pytest.raises(ConnectionError, match="Found multiple active Ray instances"):
        utils.get_address_for_submission_client(None)
    monkeypatch.setattr("ssl_ray.cluster.worker._DRIVER_ONLY", ())  # this process goes on as a driver
    set_up_worker()
    assert utils.get_address_for_submission_client(None) == "10.0.0.7:6379"


def test_workers_load_no_package_that_only_the_driver_uses(ray_cluster: None) -> None:
    """MONAI loads all of them where it is imported as usual."""

    @ray.remote
    def loaded() -> list[str]:
        import sys

        import monai.networks.nets  # noqa: F401

        unused = "ignite", "matplotlib.pyplot", "mlflow", "scipy.signal", "sklearn", "tensorboardX"
        return [name for name in unused if sys.modules.get(name)]

    assert ray.get(loaded.remote()) == []


def test_a_line_that_means_nothing_is_not_printed() -> None:
    """Whatever else Ray's workers print is; another actor's line about the same, too."""
    line = (
        "E 1 2] core_worker.cc:2146: Actor with class name: '{}' and ID: 'ab' has constructor arguments in the object "
    )
    line += "store and max_restarts > 0. If the arguments in the object store go out of scope or are lost, …"
    lines = [line.format("PreemptionWatcher"), line.format("MapWorker(Mine)"), "PreemptionWatcher poll failed"]
    seen: list[str] = []
    leave_out_harmless_lines()
    leave_out_harmless_lines()
    printed.add_handler("test", lambda batch: seen.extend(batch["lines"]))
    try:
        printed.emit({"lines": list(lines), "pid": 1, "is_err": True})
    finally:
        printed.remove_handler("test")
    assert seen == lines[1:]


@pytest.mark.parametrize("dashboard", ["", "127.0.0.1:8265", None])
def test_a_training_starts_no_actor_that_does_nothing(dashboard: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others it starts. What cleans up by the dashboard's list stays where there is one, or nobody knows."""
    from ray.train.torch import TorchTrainer

    node = None if dashboard is None else SimpleNamespace(webui_url=dashboard)
    monkeypatch.setattr("ray._private.worker._global_node", node)
    trainer = TorchTrainer(lambda: None)
    before = {type(one).__name__ for one in trainer._create_default_callbacks()}
    leave_out_actors(trainer)
    after = {type(one).__name__ for one in trainer._create_default_callbacks()}
    assert after < before
    cleaner = set() if dashboard or dashboard is None else {"PlacementGroupCleanerCallback"}
    assert before - after == {"DatasetsCallback"} | cleaner


def test_a_process_of_ray_begins_with_little() -> None:
    """A start has a dozen of them: what only the driver reads and prints with would cost each a seventh of a second."""
    code = "import sys, ssl_ray.cluster.worker\nassert not {'pydantic', 'rich', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_ray_for_this_machine_is_reached_by_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it listens on loopback, and no part asks for a port that another Ray may have.

    No file has its token, and no other user on the machine gets at its files.
    """
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import os, pathlib, psutil, ray\n"
        "from ssl_ray.cluster.connect import connect; from ssl_ray.config.schema import LocalCluster\n"
        "connect(LocalCluster(cpus=1, object_store_gigabytes=0.1))\n"
        "@ray.remote\n"
        "class Worker:\n"
        "    def ready(self): ...\n"
        "worker = Worker.remote()\n"
        "ray.get(worker.ready.remote())\n"
        "me = psutil.Process()\n"
        "for one in [me, *me.children(recursive=True)]:\n"
        "    for port in one.net_connections():\n"
        "        if port.status == 'LISTEN': print(one.name(), port.laddr.ip)\n"
        "print('agent', ray.nodes()[0]['DashboardAgentListenPort'])\n"
        "session = pathlib.Path(ray._private.worker._global_node.get_session_dir_path())\n"
        "token, folder = os.environ['RAY_AUTH_TOKEN'].encode(), session.parents[1]\n"
        "files = [path for path in session.rglob('*') if path.is_file()]\n"
        "words = [word for one in me.children(recursive=True) for word in one.cmdline()]\n"
        "print(len(files) > 5, any(token in path.read_bytes() for path in files), token.decode() in ' '.join(words))\n"
        "print(oct(folder.stat().st_mode & 0o777), folder.owner() == me.username(), 'session')\n"
    )
    done = drive(code, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = [line.rsplit(" ", 1) for line in done.stdout.splitlines() if line.count(" ") == 1]
    assert {"raylet", "gcs_server", "ray::Worker", "agent"} <= {name for name, _ in found}
    assert {where.removeprefix("::ffff:") for name, where in found if name != "agent"} == {"127.0.0.1"}
    assert int(dict(found)["agent"]) not in (-1, 0, 52365)
    assert "True False False\n0o700 True session\n" in done.stdout
    assert not (tmp_path / ".ray").exists()


@pytest.mark.slow
def test_workers_take_the_package_that_the_driver_takes(tmp_path: Path) -> None:
    """From another checkout than the installed one: its study must not be trained by the code of the other."""
    shutil.copytree(Path(module.__file__).parents[1], tmp_path / "ssl_ray", ignore=shutil.ignore_patterns("*.pyc"))
    code = (
        "import ray; from ssl_ray.cluster.connect import connect; from ssl_ray.config.schema import LocalCluster\n"
        "def found():\n"
        "    import ssl_ray\n"
        "    return ssl_ray.__file__\n"
        "connect(LocalCluster(cpus=1, object_store_gigabytes=0.1))\n"
        "print('found', found(), ray.get(ray.remote(found).remote()))"
    )
    done = drive(code, tmp_path, PYTHONPATH="")
    expected = str(tmp_path / "ssl_ray" / "__init__.py")
    assert f"found {expected} {expected}" in done.stdout, done.stdout + done.stderr
