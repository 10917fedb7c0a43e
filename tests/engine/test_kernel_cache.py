"""Promise: compiled kernels, which are code, are only read from where nobody else can have put them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.cpu import jit


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    jit.cache_folder.cache_clear()
    yield
    jit.cache_folder.cache_clear()


def test_the_folder_is_made_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "new" / "cache"))
    made = jit.cache_folder()
    assert made.is_relative_to(tmp_path / "new" / "cache")
    for folder in (made, made.parent, made.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("shared", ["", "kernels"])
def test_a_folder_that_others_can_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str
) -> None:
    (tmp_path / "cache" / shared).mkdir(parents=True)
    (tmp_path / "cache" / shared).chmod(0o777)
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(tmp_path))
    assert jit.cache_folder().is_relative_to(tmp_path / f"baton-{jit.os.getuid()}")


def test_another_users_folder_behind_a_link_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(tmp_path))
    assert not jit.cache_folder().is_relative_to(tmp_path / "cache")
