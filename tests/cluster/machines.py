"""Machines of a test's own on this one, as `docker run` would make them, but with its files and its Python.

Each has a name, a network card, processes and a `/tmp/ray` that no other one sees; all other folders are shared. They
are Linux namespaces, joined by a bridge in another one, and are gone when the process is that holds them.
"""

import os
import shutil
import subprocess
import sysconfig
import threading
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import CDLL, get_errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import wait_for

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0"
LAPTOP = f"{NETWORK}.254"
"""Address of what is on the network and no node: the person's own machine, the object store."""

_ISOLATED = ["--net", "--mount", "--uts", "--ipc", "--pid"]
_INIT = ["bash", "-c", "sleep infinity & wait"]
"""The first process of a machine, which has to take leave of processes whose parents are gone; `sleep` would not."""
_TMP = Path("/tmp/ray")


@dataclass(frozen=True)
class Machine:
    """One of them; `tmp` is where this process sees its `/tmp/ray`."""

    name: str
    address: str
    tmp: Path
    pid: int
    apart: tuple[str, ...] = tuple(_ISOLATED)

    def command(self, *words: str) -> list[str]:
        """The command that runs there, in the folder `/`."""
        return ["nsenter", f"--target={self.pid}", *self.apart, "--", *words]

    def run(self, *words: str, env: Mapping[str, str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        command = self.command(*words)
        return subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=timeout, check=False)

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function of this process whose sockets are on that machine's network."""
        results: list[Any] = []

        def within() -> None:
            with open(f"/proc/{self.pid}/ns/net") as network:
                if CDLL(None, use_errno=True).setns(network.fileno(), 0):
                    raise OSError(get_errno(), "setns")
            results.append(function())

        thread = threading.Thread(target=within)
        thread.start()
        thread.join()
        return results[0]


@contextmanager
def machines(folder: Path, *names: str) -> Iterator[tuple[Machine, list[Machine]]]:
    """The laptop, and a machine of each name; all are ended by SIGKILL, with what runs there.

    The test is skipped where the system makes no such namespaces.
    """
    if shutil.which("ip") is None or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("needs Linux namespaces: root, unshare and ip")
    _TMP.mkdir(exist_ok=True)
    addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, 1)}
    holders = []
    try:
        holders.append(subprocess.Popen(["unshare", "--net", "sleep", "infinity"]))
        laptop = Machine("laptop", LAPTOP, _TMP, holders[0].pid, ("--net",))
        wait_for(lambda: psutil.Process(laptop.pid).cmdline()[:1] == ["sleep"], "a network", 10)
        _configure(
            laptop,
            "ip link set lo up",
            "ip link add bridge type bridge",
            f"ip addr add {LAPTOP}/24 dev bridge",
            "ip link set bridge up",
        )
        made = []
        for name, address in addresses.items():
            tmp, hosts = folder / name, folder / f"{name}.hosts"
            tmp.mkdir(parents=True)
            others = [f"{known} {other}\n" for other, known in addresses.items() if other != name]
            hosts.write_text("".join(["127.0.0.1 localhost\n", f"127.0.1.1 {name}\n", *others]))  # as Debian has it
            holders.append(subprocess.Popen(["unshare", *_ISOLATED, "--fork", "--mount-proc", "--kill-child", *_INIT]))
            holder = psutil.Process(holders[-1].pid)
            (init,) = wait_for(lambda holder=holder: [p for p in holder.children() if p.name() == "bash"], name, 10)
            made.append(Machine(name, address, tmp, init.pid))
            _configure(
                laptop,
                f"ip link add {name} type veth peer name eth0 netns {init.pid}",
                f"ip link set {name} master bridge up",
            )
            _configure(
                made[-1],
                f"ip addr add {address}/24 dev eth0",
                "ip link set eth0 up",
                "ip link set lo up",
                "ip route add default dev eth0",
                f"hostname {name}",
                f"mount --bind {hosts} /etc/hosts",
                f"mount --bind {tmp} {_TMP}",
            )
        yield laptop, made
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _configure(machine: Machine, *commands: str) -> None:
    subprocess.run(machine.command("sh", "-ec", "\n".join(commands)), check=True)


def bare_python(folder: Path) -> Path:
    """Folder of the programs of a Python that has all packages of ours but `ssl_ray`, as a cluster's nodes may."""
    venv.create(folder)
    name = f"python{sysconfig.get_python_version()}"
    (folder / "lib" / name / "site-packages" / "all.pth").write_text(sysconfig.get_path("purelib"))
    ray = folder / "bin" / "ray"
    ray.write_text(f"#!{folder}/bin/python\nfrom ray.scripts.scripts import main\nmain()\n")
    ray.chmod(0o755)
    return folder / "bin"


def copy_clone(folder: Path) -> Path:
    """A clone as it is after the demo: 2 GB of packages, outputs, and somebody's CT. The large files take no room."""
    folder.mkdir()
    for name in (".gitignore", ".rayignore", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("docs", "experiments", "ssl_ray", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    sizes = {".git/objects/pack/a.pack": 2, ".venv/lib/libtorch_cuda.so": 20, ".venv-test/lib/libtorch_cuda.so": 20}
    sizes |= dict.fromkeys(("output/demo/ray/state", "output/mlflow.db", "data/phantom/a.nii.gz"), 1)
    sizes |= dict.fromkeys(("my_ct/imagesTr/a.nii.gz", "exported/model.safetensors"), 1)
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(size * 10**8)
    (folder / "my_ct" / "labelled.json").write_text("{}")
    return folder


def clean_environment() -> dict[str, str]:
    """Ours without what concerns another Ray, but for how often it looks, or says where our `ssl_ray` lies."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
    return kept | {
        key: value for key, value in os.environ.items() if key.startswith("RAY_") and "HEALTH" in key.upper()
    }
