"""A study that the cluster cannot hold is refused."""

from pathlib import Path

import pytest
import ray

from ssl_ray.cluster.connect import check_resources, check_shared
from ssl_ray.errors import UserError


def cluster_of(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> None:
    total = {name: sum(node.get(name, 0) for node in nodes) for name in {name for node in nodes for name in node}}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])


def test_a_cluster_that_is_too_small_is_refused_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs first, then GPUs; what is just enough is enough."""
    cluster_of(monkeypatch, {"CPU": 4.0})
    check_resources("pretrain.workers", "2 workers", 2, 2, 0)
    check_resources("pretrain.workers", "40 workers", 40, 0.1, 0)
    with pytest.raises(UserError, match=r"^pretrain\.workers: 3 workers need 4\.5 CPUs, the cluster has 4$"):
        check_resources("pretrain.workers", "3 workers", 3, 1.5, 0)
    with pytest.raises(UserError, match=r"^pretrain\.workers: 2 workers need 2 GPUs, the cluster has 0$"):
        check_resources("pretrain.workers", "2 workers", 2, 1, 1)


def test_what_fits_on_no_node_is_refused_though_all_nodes_together_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for ever: a GPU on one node and the CPUs beside it on another, and trials larger than any node."""
    cluster_of(monkeypatch, {"CPU": 2, "GPU": 1}, {"CPU": 16})
    with pytest.raises(
        UserError, match=r"need 4 CPUs and 0\.5 GPUs on one node, each; .* \(nodes: 2 CPUs, 1 GPUs; 16 "
    ):
        check_resources("trials", "the steps of a trial", 1, 4, 0.5)
    check_resources("trials", "the steps of a trial", 1, 2, 0.5)
    cluster_of(monkeypatch, {"CPU": 2}, {"CPU": 2})
    check_resources("pretrain.workers", "2 workers", 2, 1.5, 0)
    cluster_of(monkeypatch, {"CPU": 3}, {"CPU": 3})
    with pytest.raises(UserError, match="3 workers need 2 CPUs on one node, each; there is room for 2"):
        check_resources("pretrain.workers", "3 workers", 3, 2, 0)


def test_a_folder_of_one_machine_asks_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left in it; several nodes are asked in `test_submitted.py`."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "NodeID": "a", "NodeManagerAddress": "127.0.0.1"}])
    monkeypatch.setattr(ray, "remote", lambda **_: pytest.fail("asks a node"))
    check_shared(output=tmp_path)
    assert not list(tmp_path.iterdir())
