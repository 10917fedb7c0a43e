"""Promise: the cluster's keys are in no text that is made of a config; such texts end in logs and error messages."""

from dataclasses import fields
from typing import Any

import pytest

from cluster.plan import Plan, PlannedWorker
from gateway.config import GatewayConfig
from kv_transfer.curve import CurveKeys
from messages.common import Role
from router.actor import RouterConfig
from router.core.machine import RouterSettings
from runtime.core.shared import WorkerSettings
from runtime.worker_config import WorkerConfig

KEY = b"secret-" * 4
HOLDERS = [WorkerConfig, RouterSettings, Plan, WorkerSettings]


def made(kind: Any) -> Any:
    """One of that kind, with a key, and nothing of use beside it."""
    values: dict[str, Any] = {field.name: None for field in fields(kind)}
    return kind(**{**values, "cluster_key": KEY})


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_config_does_not_show_its_key(kind: Any) -> None:
    config = made(kind)
    assert config.cluster_key == KEY
    assert "secret" not in repr(config) + str(config)


@pytest.mark.parametrize("kind", [WorkerConfig, RouterConfig, GatewayConfig, Plan])
def test_a_config_does_not_show_the_curve_keys(kind: Any) -> None:
    curve = CurveKeys(b"public-secret", b"secret-secret")
    config = kind(**{**{field.name: None for field in fields(kind)}, "curve": curve})
    assert config.curve is curve
    assert "secret" not in repr(config) + str(config)


def test_nor_does_what_holds_such_a_config() -> None:
    router = RouterConfig(host="127.0.0.1", settings=RouterSettings(cluster_key=KEY))
    worker = PlannedWorker(made(WorkerConfig), pool=None)  # type: ignore[arg-type]
    assert "secret" not in repr(router) + repr(worker) + repr([worker]) + repr(Role.DECODE)
