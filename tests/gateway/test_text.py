"""Promise: text leaves token by token, never half a character, together exactly the decoded whole, and ends at stop
strings wherever they are cut."""

import itertools
import json
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gateway.core.errors import InvalidRequest
from gateway.core.stop_strings import StopStrings
from gateway.detokenizer import Detokenizer, Vocabulary, WindowDetokenizer
from gateway.tokenization import Tokenizer, UnusableModel
from tests.gateway.conftest import MODEL, serving

FAMILY = "👩‍👩‍👧 wörld, 日本語 🏳️‍🌈!"
IDS = st.lists(st.integers(0, 2047), max_size=40)


def streamed(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    return [*[detokenizer.step(token) for token in tokens], detokenizer.flush()]


def test_an_emoji_split_over_tokens_arrives_in_one_piece(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(FAMILY, add_special_tokens=False)
    assert len(tokens) > len(FAMILY), "characters take several tokens here"
    pieces = streamed(tokenizer.detokenizer([]), tokens)
    assert "".join(pieces) == FAMILY
    assert "👩" in pieces and not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, derandomize=True)
@given(text=st.text(max_size=40))
def test_any_text_survives_the_way_through_tokens(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(tokenizer.detokenizer([]), tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


@settings(max_examples=300, derandomize=True)
@given(tokens=IDS)
def test_any_tokens_give_the_text_of_the_whole(tokenizer: Tokenizer, tokens: list[int]) -> None:
    assert "".join(streamed(tokenizer.detokenizer([]), tokens)) == tokenizer.decode(tokens)


@settings(max_examples=200, derandomize=True)
@given(tokens=IDS, cut=st.integers(0, 40))
def test_a_replayed_transcript_goes_on_as_the_first_one_would_have(
    tokenizer: Tokenizer, tokens: list[int], cut: int
) -> None:
    whole = streamed(tokenizer.detokenizer([]), tokens)
    replayed = tokenizer.detokenizer([])
    assert [replayed.step(token) for token in tokens[:cut]] == whole[:-1][:cut]
    assert [replayed.step(token) for token in tokens[cut:]] == whole[:-1][cut:]


@settings(max_examples=200, derandomize=True)
@given(text=st.text(max_size=30))
def test_decoders_that_do_not_join_bytes_give_the_same_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    window = WindowDetokenizer(tokenizer.vocabulary, [])
    assert "".join(streamed(window, tokens)) == tokenizer.decode(tokens)


def test_a_sentencepiece_decoder_keeps_spaces_and_joins_byte_tokens() -> None:
    pieces = ["▁Hello", "▁wor", "ld", *[f"<0x{byte:02X}>" for byte in "🙂".encode()], "!"]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    vocabulary = Vocabulary(backend)
    assert not vocabulary.is_byte_level
    streams = streamed(vocabulary.detokenizer([]), list(range(8)))
    assert streams == ["Hello", " wor", "ld", "", "", "", "🙂", "!", ""]
    assert [vocabulary.token_bytes(i) for i in (1, 3)] == [b" wor", b"\xf0"]


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
PIECES = ["▁", "▁▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "▁time", "."]


@cache
def sentencepiece(kind: str) -> Backend:
    """A tokenizer as converted from SentencePiece: Llama 2's (byte tokens, Strip), or one with a Metaspace decoder."""
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *BYTES, *PIECES, *"time"])}
    merges = [("▁", "▁"), ("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=kind == "llama"))
    backend.add_special_tokens(SPECIAL)
    if kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    return backend


def ids_of(backend: Backend, *pieces: str) -> list[int]:
    ids = [backend.token_to_id(piece) for piece in pieces]
    assert None not in ids
    return ids


def joined(parts: list[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(parts))


SENTENCEPIECE = pytest.mark.parametrize("kind", ["llama", "metaspace"])
WORDS = st.sampled_from([[piece] for piece in [*SPECIAL, *PIECES]])
CHARACTERS = st.sampled_from([[f"<0x{byte:02X}>" for byte in char.encode()] for char in "é🙂語\n"])
"""Each is several byte tokens."""
TEXTS = {
    "llama": st.lists(st.one_of(WORDS, CHARACTERS), max_size=14).map(joined),
    "metaspace": st.lists(WORDS, max_size=14).map(joined),
}


@SENTENCEPIECE
def test_the_outputs_first_word_keeps_its_space(kind: str) -> None:
    backend = sentencepiece(kind)
    prompt, output = backend.encode("ab a").ids, ids_of(backend, "▁time", "▁a")
    assert backend.decode(prompt) == "ab a"
    assert streamed(Vocabulary(backend).detokenizer(prompt), output) == [" time", " a", ""]
    assert streamed(Vocabulary(backend).detokenizer([]), output) == ["time", " a", ""], "nothing stands before it"


@SENTENCEPIECE
@settings(max_examples=500, derandomize=True)
@given(data=st.data())
def test_prompt_and_streamed_text_are_the_text_of_all_tokens(kind: str, data: st.DataObject) -> None:
    backend = sentencepiece(kind)
    prompt, output = (ids_of(backend, *data.draw(TEXTS[kind])) for _ in range(2))
    pieces = streamed(Vocabulary(backend).detokenizer(prompt), output)
    assert backend.decode(prompt) + "".join(pieces) == backend.decode(prompt + output)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("chat", [False, True])
def test_clients_of_a_sentencepiece_model_see_the_first_space(chat: bool, tmp_path: Path) -> None:
    backend = sentencepiece("llama")
    backend.save(str(tmp_path / "tokenizer.json"))
    template = "{{ messages[0]['content'] }}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"vocab_size": backend.get_vocab_size(), "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        serving(tmp_path) as (cluster, server),
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        cluster.script = lambda prompt, max_tokens: ids_of(backend, "▁time", "▁a")
        arguments = {"model": MODEL, "max_tokens": 2}
        if chat:
            answer: Any = client.chat.completions.create(messages=[{"role": "user", "content": "ab a"}], **arguments)
            assert answer.choices[0].message.content == " time a"
        else:
            answer = client.completions.create(prompt=["ab a", "b"], echo=True, **arguments)
            assert [choice.text for choice in answer.choices] == ["ab a time a", "b time a"]


@settings(max_examples=200, derandomize=True)
@given(prompt=st.text("ab 🙂", max_size=12), output=st.text("ab 🙂", max_size=12))
def test_a_prompt_in_words_goes_on_in_words(prompt: str, output: str) -> None:
    backend = sentencepiece("llama")
    before, tokens = backend.encode(prompt).ids, backend.encode(output).ids  # the latter begins with a space
    text = "".join(streamed(Vocabulary(backend).detokenizer(before), tokens))
    assert prompt + text == (prompt + " " + output if prompt and output else prompt + output)


def test_a_character_that_the_prompt_began_is_whole_in_the_output() -> None:
    backend = sentencepiece("llama")
    first, *rest = ids_of(backend, *(f"<0x{byte:02X}>" for byte in "🙂".encode()))
    prompt = [*ids_of(backend, "▁a"), first]
    assert streamed(Vocabulary(backend).detokenizer(prompt), [*rest, *ids_of(backend, "▁b")]) == [
        "",
        "",
        "🙂",
        " b",
        "",
    ]


@pytest.mark.parametrize("silent", ["</s>", None], ids=["special tokens", "ids without a token"])
def test_tokens_without_text_cost_the_same_however_many_there_are(silent: str | None) -> None:
    backend = sentencepiece("llama")
    token = 5000 if silent is None else backend.token_to_id(silent)
    detokenizer = Vocabulary(backend).detokenizer(ids_of(backend, "▁a"))
    decoded: list[int] = []

    class Counting:
        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            decoded.append(len(tokens))
            text: str = backend.decode(tokens, skip_special_tokens=skip_special_tokens)
            return text

    assert isinstance(detokenizer, WindowDetokenizer)
    detokenizer._backend = Counting()  # type: ignore[assignment]
    assert streamed(detokenizer, [token] * 3000 + ids_of(backend, "▁b")) == [""] * 3000 + [" b", ""]
    assert max(decoded) <= 16 and len(decoded) < 10


def test_special_tokens_have_no_text_and_unknown_ids_do_no_harm(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer.detokenizer([]), [0, 1, 2, 999_999]) == [""] * 5
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


@settings(max_examples=500, derandomize=True)
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
