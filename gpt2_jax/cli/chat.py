"""Flags for chat, and the encoding of prompts as messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from bridge.tokenizers.tokenizer import SpecialTokenPolicy, Tokenizer
from gpt2_jax.cli.effect import Rule

_CHAT_HELP = (
    "take each prompt as the message of a user, apply the checkpoint's chat template, and print only the reply; with "
    "--interactive, the messages are one conversation"
)


@dataclass(frozen=True)
class ChatFlags:
    """Whether prompts are messages of a chat."""

    chat: Annotated[bool, arg(help=_CHAT_HELP)] = False
    system: Annotated[
        str | None, arg(metavar="TEXT", help="the system message of the chat (default: none)", help_behavior_hint="")
    ] = None
    template: Annotated[
        str | None, arg(metavar="NAME", help="the name of the chat template (default: default)", help_behavior_hint="")
    ] = None

    def encode(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        policy: SpecialTokenPolicy,
        history: Sequence[tuple[str, str]] = (),
    ) -> list[list[int]]:
        """Return the ids of each prompt. In a chat, they end with the beginning of the reply.

        Args:
            history: the earlier messages of the user and the replies, for a chat.
        """
        if not self.chat:
            return tokenizer.encode_batch(prompts, special_tokens=policy)
        if policy == "error":  # replies may have special tokens, which the model wrote
            tokenizer.encode_batch([*prompts, self.system or ""], special_tokens=policy)
            policy = "match"
        before = [] if self.system is None else [("system", self.system)]
        for message, reply in history:
            before += [("user", message), ("assistant", reply)]
        return tokenizer.encode_conversations(
            [[{"role": role, "content": text} for role, text in [*before, ("user", prompt)]] for prompt in prompts],
            template=self.template,
            add_generation_prompt=True,
            special_tokens=policy,
        )


Chat = Annotated[ChatFlags, OmitArgPrefixes]
NO_CHAT = ChatFlags()

NEEDS_CHAT = Rule(("system", "template"), lambda values: not values["chat"], "without --chat")
