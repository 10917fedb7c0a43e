"""The sixty prompts that every way through Baton must answer as transformers does, and transformers' answers.

Prompts of 1 to 3,000 tokens, cut from a text that the test makes; greedy, fp32, end-of-sequence ignored, so that an
answer has a known length. A prompt at whose answer transformers' two best logits nearly tie is of no use and is not
among them.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

ANSWERED = Path(__file__).parents[1] / ".pytest_cache" / "answered"
"""Cases that a process of the tests has had answered, by all that they come from."""
OUTPUT_TOKENS = 16
LENGTHS = [
    1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 18, 23, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 70, 79, 80, 81, 90, 95, 96, 97,
    100, 111, 112, 113, 120, 127, 128, 129, 150, 180, 200, 230, 255, 256, 257, 300, 350, 400, 480, 511, 512, 513, 600,
    750, 900, 1024, 1300, 1777, 2400, 3000,
]  # fmt: skip
NEAR_TIE = 1e-3
"""A gap between the two best logits below which rounding could choose; fp32 differs by about 1e-5 between kernels."""


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    answer: list[int]


def _text(length: int, seed: int) -> list[int]:
    """Token ids in runs that repeat, like text; from a counter, not from a generator's state."""
    words = np.random.default_rng(seed).integers(3, 2048, size=(64, 7))
    order = np.random.default_rng(seed + 1).integers(0, 64, size=length // 7 + 1)
    tokens: list[int] = words[order].ravel()[:length].tolist()
    return tokens


@lru_cache
def relay_cases(folder: Path) -> tuple[Case, ...]:
    """One case a length, answered by transformers: once, for all processes that test this model with these versions."""
    ANSWERED.mkdir(parents=True, exist_ok=True)
    kept = ANSWERED / f"{_origin(folder)}.json"
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits, and reads
        if not kept.exists():
            whole = kept.with_suffix(".part")
            whole.write_text(json.dumps([asdict(case) for case in _answered(folder)]))
            whole.rename(kept)
        return tuple(Case(**case) for case in json.loads(kept.read_text()))


def _origin(folder: Path) -> str:
    """A digest of what decides the cases: model, prompts (this file), and whose answers they are."""
    digest = hashlib.sha256(" ".join(version(package) for package in ("torch", "transformers", "numpy")).encode())
    for path in (Path(__file__), *sorted(path for path in folder.iterdir() if path.is_file())):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _answered(folder: Path) -> Iterable[Case]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (_case(model, length) for length in LENGTHS)


def _case(model: object, length: int) -> Case:
    for seed in range(length, length + 100_000, 1000):
        prompt = _text(length, seed)
        answer, gap = transformers_answer(model, prompt, OUTPUT_TOKENS)
        if gap > NEAR_TIE:
            return Case(prompt, answer)
    raise AssertionError(f"every prompt of {length} tokens has a near tie")


def cases_of(model: object, lengths: Iterable[int]) -> list[Case]:
    """Prompts of these lengths for a model of 300 tokens, none with a near tie, and transformers' answers."""
    return [_untied(model, length) for length in lengths]


def _untied(model: object, length: int) -> Case:
    for seed in range(length, length + 50):
        prompt = [(seed * 31 + place * 17) % 297 + 3 for place in range(length)]
        answer, gap = transformers_answer(model, prompt, OUTPUT_TOKENS)
        if gap > NEAR_TIE:
            return Case(prompt, answer)
    raise AssertionError(f"every prompt of {length} tokens has a near tie")


def transformers_answer(model: object, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Greedy tokens of ``generate``, and the smallest gap between the two best logits on the way."""
    import torch

    made = model.generate(  # type: ignore[attr-defined]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(made.logits)[:, 0].topk(2, dim=-1).values
    return made.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())
