"""Promise: the keys of a cluster are in a file that only its owner can read; nothing overwrites or shows it."""

import contextlib
import resource
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import cli
from cluster.api_keys import add_key
from cluster.errors import TopologyError
from cluster.keys import KeyFileError, make_keys, read_keys
from cluster.plan import make_plan
from cluster.topology import Topology


def baton(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["baton", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_keys_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert baton(monkeypatch, "keys") == 0
    file = tmp_path / "cluster.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content, keys = file.read_bytes(), read_keys(file)
    said = capsys.readouterr()
    assert "security:\n  keys: cluster.key" in said.out
    assert keys.secret.decode() not in said.out + said.err
    assert baton(monkeypatch, "keys") == 1
    assert "is there already" in capsys.readouterr().err
    assert file.read_bytes() == content
    assert baton(monkeypatch, "keys", "--out", "other.key") == 0
    assert read_keys(tmp_path / "other.key") != keys


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_keys_for_which_there_is_no_room_leave_no_file(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(KeyFileError, match=r"cluster\.key cannot be written: File too large"):
        make_keys(tmp_path / "cluster.key")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyFileError, match=r"cluster\.key cannot be written: No such file or directory"):
        make_keys(tmp_path / "nowhere" / "cluster.key")


def test_an_api_key_for_which_there_is_no_room_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "api-keys.json"
    add_key(file, "alice")
    content = file.read_bytes()
    with full_disk(), pytest.raises(KeyFileError, match=r"api-keys\.json cannot be written: File too large"):
        add_key(file, "bob")
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == content


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cluster.key"
    keys = make_keys(file)
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(KeyFileError, match="chmod 600"):
            read_keys(file)
    file.chmod(0o400)
    assert read_keys(file) == keys


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"curve_secret_key": 1}', b'{"curve_secret_key": "SECRET"}', b"x" * 10_000]
)
def test_what_is_no_key_file_is_refused_without_being_shown(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "cluster.key"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match="no key file") as refused:
        read_keys(file)
    assert "SECRET" not in str(refused.value)


def test_every_process_is_handed_the_keys_that_the_topology_names(tmp_path: Path, tiny_llama: Path) -> None:
    keys = make_keys(tmp_path / "cluster.key")
    data = {"model": str(tiny_llama), "pools": [{"name": "a", "role": "colocated"}]}
    plan = make_plan(Topology.parse({**data, "security": {"keys": "cluster.key"}}, tmp_path))
    configs = [plan.router_config(), plan.gateway_config(""), *(planned.config for planned in plan.workers(""))]
    assert [config.curve for config in configs] == [keys] * 3
    assert make_plan(Topology.parse(data, tmp_path)).curve is None
    with pytest.raises(TopologyError, match=r"security.keys: .*none.key cannot be read"):
        make_plan(Topology.parse({**data, "security": {"keys": "none.key"}}, tmp_path))
