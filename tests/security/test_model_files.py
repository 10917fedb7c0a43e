"""Promise (row 14): nothing of a model's folder is run, whichever process reads it. `tests/engine` shows the same of
the configuration and of pickled weights, `tests/gateway/test_text.py` of chat templates (row 15)."""

import ast
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import TopologyError
from cluster.model_folder import MODEL_FILES
from cluster.plan import make_plan
from cluster.topology import Topology
from engine.core.errors import ModelError
from engine.models.config import ModelConfig
from gateway.tokenization import Tokenizer
from tests.test_shape import PACKAGES, ROOT

OWN = "from pathlib import Path\nPath({canary!r}).touch()\nclass Own: pass\n"
AUTO_MAP = {
    "AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoModelForCausalLM": "own.Own",
    "AutoTokenizer": ["own.Own", "own.Own"],
}  # fmt: skip


class Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    """The tiny model, with code beside it that touches ``canary``."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    for name in ("own", "configuration_own", "modeling_own", "tokenization_own", "__init__", "conftest", "setup"):
        (folder / f"{name}.py").write_text(OWN.format(canary=str(tmp_path / "canary")))
    return folder


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def plan(model: Path) -> Any:
    return make_plan(Topology.parse({"model": str(model), "pools": [{"name": "a", "role": "colocated"}]}))


def test_code_beside_a_model_is_never_run(model: Path, tmp_path: Path) -> None:
    """Of a model that we know, whatever its files say of code of its own."""
    change(model / "config.json", auto_map=AUTO_MAP)
    change(model / "tokenizer_config.json", auto_map=AUTO_MAP, trust_remote_code=True)
    assert Tokenizer(model).encode("Once upon a time", add_special_tokens=True)
    plan(model)
    assert not (tmp_path / "canary").exists()


def test_nobody_asks_transformers_to_trust_a_folder() -> None:
    """Whoever reads a model or a tokenizer says so: what transformers would do by itself, it may do otherwise one day.
    (To have it refuse a tokenizer's own code takes it seconds; that is what this setting means.)"""
    found = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            source = path.read_text()
            for node in ast.walk(ast.parse(source)) if "from_pretrained" in source else ():
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                    said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    found.append((path.name, said.get("trust_remote_code"), said.get("use_safetensors")))
    assert {file for file, _, _ in found} == {"tokenization.py", "fallback.py", "fallback_config.py"}
    for file, trusted, safe in found:
        if file == "fallback.py":  # asks a class of transformers' own for weights
            assert safe == "True" and trusted is None
        else:
            assert trusted == "False", file


def test_an_architecture_of_a_models_own_is_not_run(model: Path, tmp_path: Path) -> None:
    change(model / "config.json", auto_map=AUTO_MAP, architectures=["Own"], model_type="own")
    with pytest.raises(ModelError):
        ModelConfig.from_folder(model)
    with pytest.raises(TopologyError):
        plan(model)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickled_weights_are_no_weights(model: Path, tmp_path: Path, name: str) -> None:
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    (model / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(TopologyError, match=r"holds no \*\.safetensors"):
        plan(model)
    assert not (tmp_path / "canary").exists()


def test_nothing_that_could_be_run_is_fetched() -> None:
    assert set(MODEL_FILES) == {"*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"}
