"""The model folder's tokenizer and chat template. None of it is code of the model's or of a client's: only tokenizers
with a Rust backend are loaded, the template runs in transformers' sandbox, and a request cannot bring its own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError

from gateway.core.errors import InvalidRequest
from gateway.detokenizer import Detokenizer, Vocabulary

SELF_CONTAINED = {"PreTrainedTokenizerFast", "TokenizersBackend"}
"""Tokenizer classes that are their tokenizer.json and no code; loading one does not load torch."""

TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What a template can raise over messages that it was not made for."""


class UnusableModel(ValueError):
    """The model folder cannot be served."""


class Tokenizer:
    """Thread-safe."""

    def __init__(self, folder: Path) -> None:
        """Raises ``UnusableModel`` or ``OSError``."""
        self.config: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
        """What config.json says."""
        config = self.config
        self.vocab_size = int(config["vocab_size"])
        """Ids that the model has a row for; the tokenizer may know fewer."""
        self.max_position_embeddings: int | None = config.get("max_position_embeddings")
        self._tokenizer = _load(folder)
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocabulary = Vocabulary(self._backend)
        self._longest_token = max((len(piece) for piece in self._backend.get_vocab()), default=1)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def surely_longer(self, text: str, num_tokens: int) -> bool:
        """Whether ``text`` cannot fit ``num_tokens`` tokens; far cheaper than to encode it."""
        return len(text) > num_tokens * self._longest_token

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """``ValueError`` for half of a surrogate pair: it is no text."""
        # The batch form lets go of the interpreter's lock: a long prompt must not hold up everybody's stream.
        try:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:
            text.encode()  # says which character it is
            raise
        ids: list[int] = encoding.ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special ones left out."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
        return text

    def detokenizer(self, prompt: Sequence[int], *, special: bool = False) -> Detokenizer:
        """For the output that follows ``prompt``. ``special``: special tokens have text too."""
        return self.vocabulary.detokenizer(prompt, special=special)

    def token_text(self, token: int) -> tuple[str, bytes]:
        """One token alone, as log-probabilities show it: its text, and its bytes. A piece of a character is shown as
        ``bytes:\\xe2``, as OpenAI does."""
        raw = self.vocabulary.token_bytes(token)
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The prompt of a conversation. ``InvalidRequest`` where the template does not take it."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **options
            )
        except TEMPLATE_FAULTS as error:
            # Only what the template itself says (raise_exception) is meant for the client's eyes.
            detail = str(error)[:200] if type(error) is TemplateError else "they do not fit it"
            raise InvalidRequest(
                f"the model's chat template refuses the messages: {detail}", param="messages"
            ) from error
        return text


def _load(folder: Path) -> Any:
    if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        raise UnusableModel(f"{folder} has no tokenizer")
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.exists() else {}
    self_contained = config.get("tokenizer_class") in SELF_CONTAINED and (folder / "tokenizer.json").exists()
    loader: Any = transformers.PreTrainedTokenizerFast if self_contained else transformers.AutoTokenizer
    tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise UnusableModel(f"{folder} has no tokenizer with a Rust backend (tokenizer.json)")
    return tokenizer
