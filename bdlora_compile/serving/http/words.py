"""Text to token ids and back, safe to be used by several threads."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from bdlora_compile.errors import RequestError
from bdlora_compile.serving.text import fast_tokenizer_of

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Words:
    """A tokenizer's two directions.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._template_owner = tokenizer
        # A copy: transformers sets truncation on its own in each call, which no other thread may see.
        self._tokenizer = Tokenizer.from_str(fast_tokenizer_of(tokenizer).to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a prompt, with the special tokens that the tokenizer adds."""
        return self._encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Ids of a conversation by the model's chat template, ready for the assistant's turn.

        Raises:
            RequestError: the model has no template, or its template refuses the messages.
        """
        if getattr(self._template_owner, "chat_template", None) is None:
            raise RequestError(
                "messages",
                found="a model without a chat template",
                expected="a tokenizer that has one",
                remedy="use /v1/completions",
            )
        try:
            text = self._template_owner.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is the model's own code and may raise anything
            raise RequestError(
                "messages",
                found=f"what the chat template refuses: {error!s:.200}",
                expected="messages as the template takes them",
                remedy="change the roles or their order",
            ) from error
        # The template has written the special tokens.
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        # As a batch of one: for a text alone tokenizers keeps Python's lock, and long ones take seconds.
        (found,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return tuple(found.ids)

    def token_text(self, token: int) -> str:
        """A token alone; special ones by their names."""
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text

    def token_bytes(self, text: str) -> list[int] | None:
        """UTF-8 of a token's text; None where it is a part of a character."""
        return None if _INCOMPLETE in text else list(text.encode())
