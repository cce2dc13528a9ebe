"""A study that the cluster cannot hold is refused."""

import pytest
import ray

from ssl_ray.cluster.connect import check_resources
from ssl_ray.errors import UserError


def test_a_cluster_that_is_too_small_is_refused_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs first, then GPUs; what is just enough is enough."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    check_resources("pretrain.workers", "2 workers", 4, 0)
    with pytest.raises(UserError, match=r"^pretrain\.workers: 3 workers need 4\.5 CPUs, the cluster has 4$"):
        check_resources("pretrain.workers", "3 workers", 4.5, 0)
    with pytest.raises(UserError, match=r"^pretrain\.workers: 2 workers need 2 GPUs, the cluster has 0$"):
        check_resources("pretrain.workers", "2 workers", 2, 2)
