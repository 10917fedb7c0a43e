"""Baton in a script, without Ray:

    from baton import LLM, SamplingParams

    with LLM(model="models/tiny-llama") as llm:
        for output in llm.generate(["Once upon a time", "The fox said"], SamplingParams(max_tokens=32)):
            print(output.prompt, output.outputs[0].text)

``topology=`` runs a topology's prefill and decode workers as threads of the process, hand-over and all.
"""

from engine.core.errors import EngineError, ModelError
from offline.llm import LLM, AsyncLLM
from offline.outputs import CompletionOutput, RequestOutput
from offline.params import SamplingParams

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "EngineError", "ModelError", "RequestOutput", "SamplingParams"]
