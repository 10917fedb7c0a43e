"""Promise: text leaves token by token, never half a character, together exactly the decoded whole, and ends at stop
strings wherever they are cut."""

import itertools
import json
import sys
import threading
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from gateway.core.errors import InvalidRequest
from gateway.core.stop_strings import StopStrings
from gateway.detokenizer import Detokenizer, Vocabulary, WindowDetokenizer
from gateway.tokenization import Tokenizer, UnusableModel

FAMILY = "👩‍👩‍👧 wörld, 日本語 🏳️‍🌈!"
IDS = st.lists(st.integers(0, 2047), max_size=40)


def streamed(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    return [*[detokenizer.step(token) for token in tokens], detokenizer.flush()]


def test_an_emoji_split_over_tokens_arrives_in_one_piece(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(FAMILY, add_special_tokens=False)
    assert len(tokens) > len(FAMILY), "characters take several tokens here"
    pieces = streamed(tokenizer.detokenizer(), tokens)
    assert "".join(pieces) == FAMILY
    assert "👩" in pieces and not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
def test_any_text_survives_the_way_through_tokens(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(tokenizer.detokenizer(), tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(tokens=IDS)
def test_any_tokens_give_the_text_of_the_whole(tokenizer: Tokenizer, tokens: list[int]) -> None:
    assert "".join(streamed(tokenizer.detokenizer(), tokens)) == tokenizer.decode(tokens)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tokens=IDS, cut=st.integers(0, 40))
def test_a_replayed_transcript_goes_on_as_the_first_one_would_have(
    tokenizer: Tokenizer, tokens: list[int], cut: int
) -> None:
    whole = streamed(tokenizer.detokenizer(), tokens)
    replayed = tokenizer.detokenizer()
    assert [replayed.step(token) for token in tokens[:cut]] == whole[:-1][:cut]
    assert [replayed.step(token) for token in tokens[cut:]] == whole[:-1][cut:]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=30))
def test_decoders_that_do_not_join_bytes_give_the_same_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    window = WindowDetokenizer(tokenizer.vocabulary.backend)
    assert "".join(streamed(window, tokens)) == tokenizer.decode(tokens)


def test_a_sentencepiece_decoder_keeps_spaces_and_joins_byte_tokens() -> None:
    pieces = ["▁Hello", "▁wor", "ld", *[f"<0x{byte:02X}>" for byte in "🙂".encode()], "!"]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    vocabulary = Vocabulary(backend)
    assert not vocabulary.is_byte_level
    streams = streamed(vocabulary.detokenizer(), list(range(8)))
    assert streams == ["Hello", " wor", "ld", "", "", "", "🙂", "!", ""]
    assert [vocabulary.token_bytes(i) for i in (1, 3)] == [b" wor", b"\xf0"]


def test_special_tokens_have_no_text_and_unknown_ids_do_no_harm(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer.detokenizer(), [0, 1, 2, 999_999]) == [""] * 5
    assert tokenizer.token_text(2) == ("<|im_end|>", b"<|im_end|>")
    assert tokenizer.token_text(999_999) == ("", b"")


def test_a_token_that_is_half_a_character_shows_its_bytes(tokenizer: Tokenizer) -> None:
    first = tokenizer.encode("👩", add_special_tokens=False)[0]
    text, raw = tokenizer.token_text(first)
    assert text.startswith("bytes:\\xf0") and raw[0] == 0xF0


def cut_text(text: str, stops: tuple[str, ...], *, include: bool) -> tuple[str, bool]:
    """The reference: the stop string that is complete first, the longest of those."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text, False
    end, length = min(ends)
    return text[: end if include else end + length], True


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    text=st.text("ab", max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.lists(st.integers(0, 20)),
    include=st.booleans(),
)
def test_stop_strings_cut_the_same_text_however_it_arrives(
    text: str, stops: tuple[str, ...], cuts: list[int], include: bool
) -> None:
    automaton = StopStrings(stops, include=include)
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    out, matched = "", False
    for first, last in itertools.pairwise(edges):
        emitted = automaton.feed(text[first:last])
        out += emitted.text
        assert cut_text(text, stops, include=include)[0].startswith(out), "emitted what should be held back"
        if emitted.matched:
            matched = True
            break
    else:
        out += automaton.flush()
    assert (out, matched) == cut_text(text, stops, include=include)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    stops = StopStrings(("END", "\n\n"), include=False)
    assert stops.feed("some text E") == ("some text ", False)
    assert stops.feed("N") == ("", False)
    assert stops.feed("T\n") == ("ENT", False)
    assert stops.feed("\nmore") == ("", True)


def test_the_chat_template_is_the_models(tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat([{"role": "user", "content": "hi"}], {"add_generation_prompt": True})
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def with_template(folder: Path, model: Path, template: str) -> Tokenizer:
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ lipsum.__globals__['os'].mkdir('MARKER') }}",
        "{{ lipsum.__globals__['__builtins__']['open']('MARKER', 'w') }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ messages['content'] + 1 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% if %}",
    ],
)
def test_a_hostile_template_gets_nothing_but_a_refusal(template: str, tmp_path: Path, tiny_llama: Path) -> None:
    marker = tmp_path / "executed"
    hostile = with_template(tmp_path, tiny_llama, template.replace("MARKER", str(marker)))
    with pytest.raises(InvalidRequest) as refused:
        hostile.render_chat([{"role": "user", "content": "hi"}], {"add_generation_prompt": True})
    assert not marker.exists(), "the template has run code"
    assert refused.value.message == "the model's chat template refuses the messages: they do not fit it"


def test_the_marker_of_hostile_templates_shows_a_template_that_runs_free(tmp_path: Path) -> None:
    template = jinja2.Template("{{ lipsum.__globals__['os'].mkdir(marker) }}")
    template.render(marker=str(tmp_path / "executed"))
    assert (tmp_path / "executed").exists()


def test_a_template_may_say_why_it_refuses(tmp_path: Path, tiny_llama: Path) -> None:
    strict = with_template(tmp_path, tiny_llama, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="refuses the messages: roles must alternate"):
        strict.render_chat([{"role": "user", "content": "hi"}], {})


def test_a_long_prompt_is_encoded_without_the_interpreters_lock(tokenizer: Tokenizer) -> None:
    text = "hello world " * 20_000
    done = threading.Event()
    ids: list[int] = []

    def encode() -> None:
        ids.extend(tokenizer.encode(text, add_special_tokens=True))
        done.set()

    thread = threading.Thread(target=encode)
    turns = 0
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        thread.start()
        while not done.is_set():
            turns += 1
    finally:
        sys.setswitchinterval(switch)
        thread.join()
    assert turns > 30_000, "another thread stood still meanwhile"
    assert ids == tokenizer.vocabulary.backend.encode(text).ids


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(UnusableModel, match="no tokenizer"):
        Tokenizer(tmp_path)
