"""`baton chat`: talk to the model; the conversation so far goes along with every message."""

from typing import Any

from rich.console import Console
from rich.markup import escape

from cluster.client import only_model, stream, text_of, trace_of
from cluster.errors import ClusterError

HELP = "/clear starts anew, /quit or Ctrl-D ends"


def chat(console: Console, url: str, *, system: str | None, temperature: float, max_tokens: int) -> None:
    """Read, stream, repeat, until the input ends."""
    model = only_model(url)
    first = [{"role": "system", "content": system}] if system else []
    history = list(first)
    console.print(f"[bold]{escape(model)}[/] at {escape(url)} - {HELP}", highlight=False, soft_wrap=True)
    while True:
        try:
            said = console.input("[cyan]> [/]" if console.is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if said in ("/quit", "/exit"):
            return
        if said == "/clear":
            history = list(first)
        elif said:
            _turn(console, url, history, said, model=model, temperature=temperature, max_tokens=max_tokens)


def _turn(console: Console, url: str, history: list[dict[str, str]], said: str, **sampling: Any) -> None:
    """One answer, streamed; a turn that fails or is interrupted is taken back."""
    history.append({"role": "user", "content": said})
    answer, trace = "", None
    try:
        for chunk in stream(url, "/v1/chat/completions", {"messages": history, **sampling}):
            answer += text_of(chunk)
            trace = trace_of(chunk) or trace
            console.print(text_of(chunk), end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/]")
        history.pop()
        return
    except ClusterError as error:
        console.print(f"\n[red]{escape(str(error))}[/]" if answer else f"[red]{escape(str(error))}[/]", highlight=False)
        history.pop()
        return
    console.print()
    history.append({"role": "assistant", "content": answer})
    if trace is not None:
        workers = " -> ".join(dict.fromkeys((trace["prefill_worker"], trace["decode_worker"])))
        console.print(f"[dim]{workers}, first token after {trace['ttft_ms']:.0f} ms[/]", highlight=False)
