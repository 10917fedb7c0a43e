"""Runs in the environment of langchain-openai: prints what it got, as JSON."""

import asyncio
import json
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

common = {"model": "tiny-llama", "base_url": sys.argv[1], "api_key": "none", "temperature": 0, "max_tokens": 12}
chat = ChatOpenAI(**common, stream_usage=True)
messages = [SystemMessage("You tell stories."), HumanMessage("Once upon a time")]


async def alone() -> str:
    return "".join([str(chunk.content) async for chunk in chat.astream(messages)])


answer = chat.invoke(messages)
whole = None
for chunk in chat.stream(messages):
    whole = chunk if whole is None else whole + chunk
assert whole is not None
scored = ChatOpenAI(**common, logprobs=True, top_logprobs=2).invoke(messages)
said = {
    "invoked": answer.content,
    "usage": answer.usage_metadata,
    "finish": answer.response_metadata["finish_reason"],
    "streamed": whole.content,
    "streamed_usage": whole.usage_metadata,
    "asynchronous": asyncio.run(alone()),
    "batch": [str(each.content) for each in chat.batch(["One", "Two", "Three"])],
    "completion": OpenAI(**common).invoke("Once upon a time"),
    "logprobs": len(scored.response_metadata["logprobs"]["content"]),
}
print(json.dumps(said))
