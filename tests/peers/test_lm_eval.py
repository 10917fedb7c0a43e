"""Promise: lm-eval's `local-completions` measures the model, not the server: its log-likelihoods are those that
`transformers` gives for the same tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.peers.conftest import program, run

TASKS = Path(__file__).with_name("lm_eval_tasks")
STORIES = [
    "Once upon a time there was a little girl named Lily. She loved to play in the park",
    "The big dog ran to the tree and looked up. A small cat sat there",
    "Tom had a red ball. He wanted to share it with his friend",
]
ENDINGS = ["with her friends.", "purple seventeen of the.", "and was happy."]


@pytest.fixture
def samples(url: str, tiny_llama: Path, tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval has seen, by task."""
    tool = program("lm_eval", "lm_eval")
    tasks = tmp_path / "tasks"
    shutil.copytree(TASKS, tasks)
    rows = [{"story": story, "endings": ENDINGS, "right": 0} for story in STORIES]
    (tmp_path / "endings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    arguments = f"model=tiny-llama,base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={tiny_llama}"
    run(
        tool, "run", "--model", "local-completions", "--model_args", f"{arguments},num_concurrent=4",
        "--tasks", "endings,stories,continue", "--include_path", tasks, "--batch_size", "2",
        "--output_path", tmp_path / "out", "--log_samples",
        cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    for path in (tmp_path / "out").rglob("samples_*.jsonl"):
        found[path.name.split("_")[1]] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def test_lm_eval_measures_the_model(samples: dict[str, list[dict[str, Any]]], tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    def score(context: list[int], rest: list[int]) -> tuple[float, bool]:
        """Log-likelihood of ``rest`` behind ``context``, and whether each of its tokens is the likeliest."""
        with torch.inference_mode():
            logprobs = model(torch.tensor([context + rest])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
        likeliest = logprobs.argmax(-1).tolist()
        return sum(logprobs[i, token].item() for i, token in enumerate(rest)), likeliest == rest

    assert {name: len(rows) for name, rows in samples.items()} == {"endings": 3, "stories": 3, "continue": 3}
    for row in samples["endings"]:
        story = row["doc"]["story"]
        for ending, ((told, greedy),) in zip(ENDINGS, row["resps"], strict=True):
            context = tokenizer(story)["input_ids"]
            rest = tokenizer(f"{story} {ending}")["input_ids"][len(context) :]
            expected, likeliest = score(context, rest)
            assert float(told) == pytest.approx(expected, abs=0.001)
            assert greedy in (likeliest, str(likeliest))
    for row in samples["continue"]:
        ((text,),) = row["resps"]
        assert text and "." not in text


def test_lm_eval_tells_sense_from_nonsense(samples: dict[str, list[dict[str, Any]]]) -> None:
    for row in samples["endings"]:
        likelihoods = [float(answer[0][0]) for answer in row["resps"]]
        assert likelihoods[1] == min(likelihoods)
    for row in samples["stories"]:
        ((told,),) = row["resps"]
        assert -200 < float(told if isinstance(told, str) else told[0] if isinstance(told, list) else told) < -5
