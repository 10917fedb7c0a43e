"""How much of a prompt's KV leaves behind the prompt's own computation; a JSON line for each transport and length.

    python benchmarks/overlap.py [--model DIR] [--transport shm zmq] [--tokens 1024 2048] [--repeat 9] [--threads 2]

A prefill worker and a decode worker, each a process, and this one in the place of router and gateway. Prompts one at a
time, in chunks of ``--chunk`` tokens, in turns with layer-wise pushes and without (each chunk's blocks are then pushed
whole when it is computed). Without ``--model`` the 135M shape of ``benchmarks/engine.py``, random weights.

``share_hidden``: bytes that had left before the prompt's last layer was computed, of all; ``last_layers_ms``: from the
first token to the last byte, as the prefill worker's trace has it; ``second_token_ms``: from the first token to the
second, as they come to the gateway. ``after_prompt_ms``: from the first token to decode's ack.
"""

import argparse
import json
import multiprocessing
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# This file's folder must not stand in for packages.
sys.path[0] = str(Path(__file__).parents[1])

from kv_transfer.core.trace import TransferTrace  # noqa: E402
from messages.codec import decoder_for, pack_tokens, unpack_tokens  # noqa: E402
from messages.common import Generation, Role, WorkerAddress  # noqa: E402
from messages.gateway_to_worker import EndAck, Prefill  # noqa: E402
from messages.ids import Attempt, RequestId  # noqa: E402
from messages.sampling import SamplingParams  # noqa: E402
from messages.tickets import mint  # noqa: E402
from messages.worker_to_gateway import AttemptFailed, TokenBatch  # noqa: E402
from messages.worker_to_router import Leaving, Register, Report  # noqa: E402
from runtime.mailbox import Mailbox  # noqa: E402
from runtime.worker_config import WorkerConfig  # noqa: E402

PATIENCE = 120.0
PARAMS = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


def work(config: WorkerConfig, pipe: Connection) -> None:
    """A worker's process: does what comes through the pipe, until None comes."""
    from prefill_worker.core.handoff import Handoffs
    from worker.actor import Worker

    worker = Worker(config)
    worker.start()
    live, computing = True, Handoffs.computing

    def computing_if_live(self: Handoffs, *given: Any) -> Any:
        return computing(self, *given) if live else []

    Handoffs.computing = computing_if_live  # type: ignore[method-assign]
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        if asked == "trace":
            assert worker._loop is not None
            worker._loop.ask(lambda machine: pipe.send(machine.traces[-1] if machine.traces else None))  # type: ignore
        else:
            live = asked
            pipe.send("so be it")
    worker.stop()


class Pair:
    """The two workers, and the gateway's end of a request."""

    def __init__(self, model: Path, transport: str, options: argparse.Namespace) -> None:
        self._router = Mailbox("127.0.0.1", decoder_for(Register, Report, Leaving))
        self._gateway = Mailbox("127.0.0.1", decoder_for(TokenBatch, AttemptFailed))
        self._key = secrets.token_bytes(32)
        self._addresses: dict[str, WorkerAddress] = {}
        self._pipes: dict[Role, Connection] = {}
        self._processes = []
        spawn = multiprocessing.get_context("spawn")
        for role in (Role.PREFILL, Role.DECODE):
            config = WorkerConfig(
                worker=role, role=role, host="127.0.0.1", router=self._router.address, cluster_key=self._key,
                model=str(model), dtype="auto", device="cpu", num_blocks=1024, block_size=16, kv_dtype="auto",
                enable_prefix_caching=False, transport=transport, max_num_seqs=4, max_num_batched_tokens=options.chunk,
                prefill_chunk=options.chunk, max_model_len=8192, threads=options.threads,
            )  # fmt: skip
            self._pipes[role], there = spawn.Pipe()
            self._processes.append(spawn.Process(target=work, args=(config, there), daemon=True))
            self._processes[-1].start()
        for pipe in self._pipes.values():
            pipe.recv()
        self._wait(lambda: len(self._addresses) == 2)

    def request(self, tokens: int, rng: random.Random, *, live: bool) -> tuple[list[float], TransferTrace]:
        """Times at which tokens came, the first at 0, and the prefill worker's trace."""
        self._pipes[Role.PREFILL].send(live)
        self._pipes[Role.PREFILL].recv()  # else the first step of the prompt could be planned before
        request, attempt = RequestId(f"{rng.getrandbits(128):032x}"), Attempt(1)
        prefill, decode = (self._addresses[role] for role in (Role.PREFILL, Role.DECODE))
        generation = Generation(pack_tokens([rng.randrange(1000, 40_000) for _ in range(tokens)]), PARAMS)
        ticket = mint(self._key, request, attempt, prefill, decode)
        order = Prefill(request, attempt, self._gateway.address, generation, decode, ticket)
        self._gateway.send(prefill.mailbox, order)
        came: dict[int, float] = {}

        def over() -> bool:
            for message in self._gateway.receive(0.002):
                now = time.monotonic()
                if isinstance(message, AttemptFailed):
                    raise RuntimeError(message.detail)
                for chunk in message.chunks:
                    for place in range(len(unpack_tokens(chunk.tokens))):
                        came.setdefault(chunk.index + place, now)
                    if chunk.finish is not None:
                        worker = self._addresses[message.worker]
                        self._gateway.send(worker.mailbox, EndAck(chunk.request, chunk.attempt))
            return len(came) == PARAMS.max_tokens

        self._wait(over)
        return [came[place] - came[0] for place in sorted(came)], self._trace(request)

    def _trace(self, request: RequestId) -> TransferTrace:
        """Of the hand-over, which ends a moment after its tokens."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self._pipes[Role.PREFILL].send("trace")
            trace: TransferTrace | None = self._pipes[Role.PREFILL].recv()
            if trace is not None and trace.key.request == request:
                return trace
        raise RuntimeError("the hand-over has not ended")

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError("waited in vain")
            for message in self._router.receive(0):
                if isinstance(message, Register):
                    self._addresses[message.address.worker] = message.address

    def close(self) -> None:
        for pipe in self._pipes.values():
            pipe.send(None)
        for process in self._processes:
            process.join(PATIENCE)
            process.kill()
        self._router.close()
        self._gateway.close()


def measure(pair: Pair, tokens: int, repeat: int) -> dict[str, Any]:
    rng = random.Random(tokens)
    for live in (True, False):
        pair.request(tokens, rng, live=live)
    runs: dict[bool, list[tuple[list[float], TransferTrace]]] = {True: [], False: []}
    for _ in range(repeat):
        for live, taken in runs.items():
            taken.append(pair.request(tokens, rng, live=live))
    figures: dict[str, Any] = {}
    for live, taken in runs.items():
        traces = [trace for _, trace in taken]
        figures["live" if live else "whole"] = {
            "share_hidden": summary([trace.share_hidden for trace in traces], 1, 3),
            "last_layers_ms": summary([trace.last_byte - trace.computed for trace in traces], 1000, 2),
            "after_prompt_ms": summary([trace.acked - trace.computed for trace in traces], 1000, 2),
            "second_token_ms": summary([times[1] for times, _ in taken], 1000, 2),
            "prompt_ms": summary([trace.computed - trace.opened for trace in traces], 1000, 0),
            "pushes": statistics.median(len(trace.pushes) for trace in traces),
            "mib": round(traces[0].num_bytes / 2**20, 1),
        }
    return figures


def summary(values: list[float], scale: float, digits: int) -> dict[str, float]:
    low, middle, high = min(values), statistics.median(values), max(values)
    names = ("min", "median", "max")
    return {name: round(value * scale, digits) for name, value in zip(names, (low, middle, high), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; else the 135M shape is made")
    parser.add_argument("--transport", nargs="+", default=["shm", "zmq"], choices=["shm", "zmq"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a step")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="of each worker")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.model is None:
            options.model = Path(scratch)
            make = str(Path(__file__).with_name("engine.py"))
            subprocess.run([sys.executable, make, "--make", "135m", scratch], check=True)
        for transport in options.transport:
            pair = Pair(options.model, transport, options)
            try:
                for tokens in options.tokens:
                    head = {"transport": transport, "tokens": tokens, "chunk": options.chunk}
                    print(json.dumps(head | measure(pair, tokens, options.repeat)), flush=True)
            finally:
                pair.close()


if __name__ == "__main__":
    main()
