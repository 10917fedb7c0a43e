"""Token ids to text, a token at a time: never half a character, and together the text of all tokens decoded at once.

Pure functions of the tokens: replaying a transcript gives the same text in the same pieces.
"""

import codecs
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

from tokenizers import Tokenizer as Backend

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
PATIENCE = 8
"""Tokens after which an unfinished character is taken for a broken one: the longest has 4 bytes."""
CONTEXT = 5
"""Tokens of the prompt that a decoder sees before the first one of the output, as in vLLM."""
LOOK_BACK = 4 * CONTEXT
"""Tokens of the prompt that are searched for those, since some have no text and some are pieces of characters."""


class Detokenizer(Protocol):
    def step(self, token: int) -> str:
        """The text that is certain with this token; often empty within a character."""

    def flush(self) -> str:
        """The rest, after the last token."""


class Vocabulary:
    """The backend's tokens as bytes, where its decoder joins bytes (all byte-level BPE models)."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        state = json.loads(backend.to_str())
        self._special = {added["id"] for added in state["added_tokens"] if added["special"]}
        self.is_byte_level = (state.get("decoder") or {}).get("type") == "ByteLevel"
        self._bytes: dict[int, bytes] = {}

    def detokenizer(self, prompt: Sequence[int], *, special: bool = False) -> Detokenizer:
        """A fresh one for what follows ``prompt``; special tokens have no text unless ``special``."""
        if self.is_byte_level:
            return ByteDetokenizer(self.token_bytes if special else self.text_bytes)
        return WindowDetokenizer(self, prompt, special=special)

    def is_silent(self, token: int) -> bool:
        """Whether ``token`` is special, or an id without a token: neither has text."""
        return token in self._special or self.is_unknown(token)

    def is_unknown(self, token: int) -> bool:
        """Whether ``token`` is an id without a token."""
        return self.backend.id_to_token(token) is None

    def text_bytes(self, token: int) -> bytes:
        """What ``token`` adds to a text: nothing for special tokens, and for ids without a token."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = b"" if token in self._special else self.token_bytes(token)
        return known

    def token_bytes(self, token: int) -> bytes:
        """The token's own bytes, for log-probabilities; of special tokens too."""
        piece = self.backend.id_to_token(token)
        if piece is None:
            return b""
        if self.is_byte_level:
            return _byte_level(piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


class ByteDetokenizer:
    def __init__(self, text_bytes: Callable[[int], bytes]) -> None:
        """``text_bytes``: what a token adds to the text."""
        self._text_bytes = text_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, token: int) -> str:
        return self._decoder.decode(self._text_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any decoder: decodes the last few tokens with and without the new ones, and emits the difference (as
    text-generation-inference does).

    The window begins with the prompt's last tokens as if they were emitted: decoders of SentencePiece models drop the
    space that a text begins with, which the output's first word must keep.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], *, special: bool = False) -> None:
        """``special``: special tokens have text too."""
        self._backend = vocabulary.backend
        self._special = special
        self._is_silent = vocabulary.is_unknown if special else vocabulary.is_silent
        self._window = self._context(prompt)
        self._known = len(self._window)  # tokens of the window whose text is emitted

    def step(self, token: int) -> str:
        if self._is_silent(token):
            return ""
        self._window.append(token)
        fresh = self._difference()
        pending = len(self._window) - self._known
        if pending < PATIENCE and (not fresh or fresh.endswith(UNFINISHED)):
            return ""
        if not fresh:  # so many tokens without a text will not get one
            del self._window[self._known :]
            return ""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return fresh

    def flush(self) -> str:
        fresh = self._difference()
        self._known = len(self._window)
        return fresh

    def _difference(self) -> str:
        known, every = self._decode(self._window[: self._known]), self._decode(self._window)
        if not every.startswith(known):  # half a character, with which a prompt may end, has become whole
            known = known.rstrip(UNFINISHED)
        return every[len(known) :]

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of ``prompt`` that have text; a few more where they begin within a character."""
        context: list[int] = []
        for token in reversed(prompt[-LOOK_BACK:]):
            if self._is_silent(token):
                continue
            if len(context) >= CONTEXT and not self._decode(context).startswith(UNFINISHED):
                break
            context.insert(0, token)
        return context

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._backend.decode(tokens, skip_special_tokens=not self._special)
        return text


@lru_cache(1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(piece: str) -> bytes:
    alphabet = _byte_of_character()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()  # an added token outside the alphabet stands for itself
