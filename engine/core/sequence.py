"""One sequence: its tokens, how many of them are computed, and the blocks that hold their KV."""

from enum import Enum, auto

import numpy as np

from engine.core.blocks import NO_BLOCKS, Blocks
from engine.core.moves import Saved
from engine.core.outputs import TokenLogprobs
from engine.core.prefix import BlockHashes, Tokens
from messages.sampling import FinishReason, SamplingParams

_EMPTY: Tokens = np.empty(0, np.int32)


class SequenceStatus(Enum):
    NEW = auto()
    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    """Its blocks were taken; it waits to be computed again."""
    HANDED_OVER = auto()
    """Its first token is there; another worker goes on, and the blocks wait for that."""
    FINISHED = auto()
    REMOVED = auto()


_MOVES = {
    SequenceStatus.NEW: {SequenceStatus.WAITING},
    SequenceStatus.WAITING: {SequenceStatus.RUNNING, SequenceStatus.REMOVED},
    SequenceStatus.RUNNING: {
        SequenceStatus.PREEMPTED, SequenceStatus.HANDED_OVER, SequenceStatus.FINISHED, SequenceStatus.REMOVED,
    },
    SequenceStatus.PREEMPTED: {SequenceStatus.RUNNING, SequenceStatus.REMOVED},
    SequenceStatus.HANDED_OVER: set(),
    SequenceStatus.FINISHED: set(),
    SequenceStatus.REMOVED: set(),
}  # fmt: skip


class Sequence:
    """Tokens and blocks of one request on one worker.

    ``generated`` holds tokens that earlier attempts made: they count as output, and are computed like a prompt.
    ``blocks`` and ``num_computed_tokens`` describe KV that has landed. With ``hand_over`` the scheduler stops after the
    first new token, and never frees the blocks: whoever made the sequence does. Only sequences of the same ``salt``
    share blocks.
    """

    __slots__ = (
        "_blocks", "_num_blocks", "_tokens", "arrival", "awaits", "finish_reason", "hand_over", "hashes",
        "num_cached_tokens", "num_computed_tokens", "num_final_blocks", "num_prompt_tokens", "num_tokens", "params",
        "plain_greedy", "prompt_logprobs", "salt", "saved", "seq_id", "shared_tail", "status",
    )  # fmt: skip

    def __init__(
        self,
        seq_id: str,
        prompt: Tokens,
        params: SamplingParams,
        *,
        generated: Tokens | None = None,
        blocks: Blocks | None = None,
        num_computed_tokens: int = 0,
        hand_over: bool = False,
        salt: bytes = b"",
        hashes: BlockHashes | None = None,
    ) -> None:
        generated = _EMPTY if generated is None else generated
        self.seq_id = seq_id
        self.params = params
        self.plain_greedy = not params.draws and not params.alters_logits
        self.hand_over = hand_over
        self.num_prompt_tokens = len(prompt)
        self.num_tokens = len(prompt) + len(generated)
        if not self.num_prompt_tokens:
            raise ValueError("a sequence needs a prompt of at least one token")
        if not 0 <= num_computed_tokens < self.num_tokens:
            raise ValueError(f"{num_computed_tokens} of {self.num_tokens} tokens cannot be computed already")
        self.num_computed_tokens = num_computed_tokens
        self._tokens = np.empty(max(64, self.num_tokens * 2), np.int32)
        self._tokens[: len(prompt)] = prompt
        self._tokens[len(prompt) : self.num_tokens] = generated
        self._blocks = NO_BLOCKS if blocks is None else blocks.copy()
        self._num_blocks = len(self._blocks)
        self.salt = salt
        self.hashes = hashes
        self.num_final_blocks = 0
        """Leading blocks whose KV is final, and which can be found by others."""
        self.num_cached_tokens = 0
        """Tokens whose KV was there when it was first started."""
        self.shared_tail = False
        """Whether the block that it writes to next may be somebody else's too."""
        self.saved: Saved | None = None
        """Its KV in the host tier, while it is preempted."""
        self.arrival = 0
        """Its place in the order in which sequences came."""
        self.awaits: object = None
        """What it waits for, which another sequence is computing."""
        self.status = SequenceStatus.NEW
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []

    @property
    def token_ids(self) -> Tokens:
        """Prompt and output; a view."""
        return self._tokens[: self.num_tokens]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> Tokens:
        return self._tokens[self.num_prompt_tokens : self.num_tokens]

    @property
    def block_table(self) -> Blocks:
        """The blocks that it owns, in the order of its tokens; a view."""
        return self._blocks[: self._num_blocks]

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether the logits of every token of its prompt are wanted still."""
        return self.params.prompt_logprobs is not None and self.num_output_tokens == 0

    def append_token(self, token: int) -> None:
        if self.num_tokens == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
        self._tokens[self.num_tokens] = token
        self.num_tokens += 1

    def append_blocks(self, blocks: Blocks) -> None:
        total = self._num_blocks + len(blocks)
        if total > len(self._blocks):
            grown = np.empty(max(16, 2 * total), np.int32)
            grown[: self._num_blocks] = self.block_table
            self._blocks = grown
        self._blocks[self._num_blocks : total] = blocks
        self._num_blocks = total

    def replace_block(self, place: int, block: int) -> int:
        """Put another block into its table; returns the one that was there."""
        previous = int(self._blocks[place])
        self._blocks[place] = block
        return previous

    def restart(self) -> None:
        """It has no KV any more: all of it is to be computed again."""
        assert not self._num_blocks, f"{self} still has blocks"
        self.num_computed_tokens = self.num_final_blocks = 0
        self.shared_tail = False
        self.prompt_logprobs.clear()

    def take_blocks(self) -> Blocks:
        """Its blocks, which it no longer owns."""
        blocks = self.block_table.copy()
        self._num_blocks = 0
        return blocks

    def move(self, status: SequenceStatus) -> None:
        """Change the status; an illegal move is a bug and tells the sequence's story."""
        assert status in _MOVES[self.status], f"{self} cannot become {status.name}"
        self.status = status

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.seq_id} {self.status.name}: {self.num_computed_tokens} of {self.num_tokens} tokens "
            f"computed ({self.num_prompt_tokens} prompt), {self._num_blocks} blocks>"
        )
