"""Promise: compiled kernels, which are code, are only read from where nobody else can have put them; they are there
before the first step, which must not take as long as they take; of processes that need one at once one compiles it."""

import fcntl
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import pytest

from engine.cpu import elementwise, gemm, jit, paged_attention
from engine.engine import Engine
from messages.sampling import SamplingParams


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


@pytest.mark.skipif(not jit.available, reason="torch does not compute with libgomp here")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_step_waits_for_a_kernel(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    for module in (elementwise, gemm, paged_attention):
        for each in vars(module).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()
    engine = Engine(tiny_llama, dtype=dtype, kv_bytes=1 << 20)
    monkeypatch.setattr(jit, "Kernel", None)  # nothing can be compiled any more
    (made,) = engine.generate([list(range(3, 43))], SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(made.token_ids) == 2


def nothing(arguments: Any) -> None:
    pass


def somebody_waits_for(lock: Path) -> bool:
    """See proc_locks(5)."""
    waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return any(line[5] == str(os.getpid()) and line[6].endswith(f":{lock.stat().st_ino}") for line in waiting)


def test_who_comes_while_another_compiles_loads_what_that_one_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path))
    lock = jit.cache_folder() / "lock"
    with ThreadPoolExecutor(1) as thread:
        with open(lock, "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            kernel = thread.submit(jit.Kernel, nothing, 1)
            deadline = time.monotonic() + 30
            while not somebody_waits_for(lock):
                assert time.monotonic() < deadline, "it does not wait"
            monkeypatch.setattr(numba.config, "CACHE_DIR", str(jit.cache_folder()))
            numba.cfunc(jit._SIGNATURE, cache=True, fastmath={"contract"})(nothing)
        assert kernel.result()._compiled.cache_hits == 1
