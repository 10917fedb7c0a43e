"""Promise: the load generator `aiperf` loads Baton and gets its figures: every request is answered, streamed, with as
many tokens as it asked for."""

import json
import shutil
from pathlib import Path

import pytest

from tests.peers.conftest import program, run


def hub_with(model: Path, home: Path) -> str:
    """A cache of the Hugging Face Hub that has the model: aiperf takes no tokenizer from a folder."""
    folder = home / "hub" / "models--baton--tiny-llama"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(model, folder / "snapshots" / commit)
    return str(home)


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_aiperf_counts_every_request(kind: str, url: str, tiny_llama: Path, tmp_path: Path) -> None:
    tool = program("aiperf", "aiperf")
    said = run(
        tool, "profile", "--model", "tiny-llama", "--tokenizer", "baton/tiny-llama", "--url", url,
        "--endpoint-type", kind, "--streaming", "--concurrency", "4", "--request-count", "24",
        "--prompt-input-tokens-mean", "60", "--prompt-output-tokens-mean", "16",
        "--extra-inputs", "ignore_eos:true", "--use-server-token-count", "--random-seed", "1",
        "--output-artifact-dir", tmp_path, "--ui", "none", "--no-gpu-telemetry",
        cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=hub_with(tiny_llama, tmp_path / "hf"),
    )  # fmt: skip
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    figures = json.loads(report.read_text())
    assert figures["request_count"]["avg"] == 24, said
    assert not figures.get("error_summary")
    assert figures["output_sequence_length"]["avg"] == pytest.approx(16, abs=0.01)
    assert 0 < figures["time_to_first_token"]["avg"] <= figures["request_latency"]["avg"]
    assert figures["inter_token_latency"]["avg"] > 0
