"""A model's tokenizer, from its folder: text to ids and back, without transformers or torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import xxhash

from streamopd.errors import UserError
from streamopd.schemas import Turn

from .chat_template import ChatTemplate

SPECIAL_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """`tokenizer.json` and what the other files of the folder say about it."""

    def __init__(self, core: tokenizers.Tokenizer, folder: Path) -> None:
        self.folder = folder
        self._core = core
        self._tokenizer_config = _read_json(folder / "tokenizer_config.json")

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """The tokenizer of an HF folder. UserError when it has no readable tokenizer.json."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{folder} has no tokenizer.json, only {_listing(folder)}. Write one with "
                "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        if "model" not in _read_json(file):  # the library's own complaint is a bare Exception
            raise UserError(f"{file} is JSON but no tokenizer: it has no `model`. Copy it again from the model's source.")
        core = tokenizers.Tokenizer.from_file(str(file))
        core.no_truncation()  # a prompt is refused when it is too long, never cut
        core.no_padding()
        return cls(core, folder)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the special tokens that the tokenizer itself adds (a BOS, where it has one)."""
        return list(self._core.encode(text).ids)

    def encode_answer(self, text: str) -> list[int]:
        """Ids of an answer that ends: no special tokens before it, and a stop id at its end unless its text ends with one."""
        ids = list(self._core.encode(text, add_special_tokens=False).ids)
        return ids if ids and ids[-1] in self.stop_ids else [*ids, self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return str(self._core.decode(list(ids), skip_special_tokens=True))

    def render(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation with the opening of the answer. UserError when the folder has no chat template."""
        if self._chat_template is None:
            raise UserError(
                f"The question is a conversation of {len(turns)} turns, but the tokenizer in {self.folder} has no chat "
                "template. Put a chat_template.jinja there, use an instruct model, or give the data a `prompt` column."
            )
        return list(self._core.encode(self._chat_template.text(turns), add_special_tokens=False).ids)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Role -> token, such as "eos_token" -> "</s>"."""
        told = _read_json(self.folder / "special_tokens_map.json") | self._tokenizer_config
        return {role: _content(told[role]) for role in SPECIAL_ROLES if told.get(role)}

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: of generation_config.json, else config.json, else the tokenizer's EOS."""
        ids = self._told_id("eos_token_id")
        if ids is None:
            ids = self._special_id("eos_token")
        if ids is None:
            raise UserError(
                f"Nothing in {self.folder} says which token ends an answer: eos_token_id is in neither generation_config.json "
                "nor config.json, and tokenizer_config.json has no known eos_token. Add eos_token_id to generation_config.json."
            )
        return tuple(ids) if isinstance(ids, list) else (ids,)

    @cached_property
    def end_id(self) -> int:
        """The stop id that an answer is given where it has none: the tokenizer's EOS where it is one of them, else the first."""
        eos = self._special_id("eos_token")
        return eos if eos in self.stop_ids else self.stop_ids[0]

    @cached_property
    def pad_id(self) -> int:
        """The id that fills rows; without one of its own, the first stop id does (padding is always masked or cut)."""
        told = self._special_id("pad_token")
        if told is None:
            told = self._told_id("pad_token_id")
        return self.stop_ids[0] if told is None else int(told)

    @property
    def vocab_size(self) -> int:
        """Ids that have a token. A model's head may be wider (padded)."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    @property
    def ids(self) -> int:
        """One more than the highest id that has a token."""
        return 1 + max(self._core.get_vocab(with_added_tokens=True).values())

    @cached_property
    def digest(self) -> str:
        """Of the id -> token table: equal digests mean that ids can travel between two models."""
        table = sorted((index, token) for token, index in self._core.get_vocab(with_added_tokens=True).items())
        return xxhash.xxh3_128_hexdigest("".join(f"{index}\t{token}\n" for index, token in table).encode())

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        file = self.folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else self._tokenizer_config.get("chat_template")
        if isinstance(source, list):  # several by name, as {"name", "template"}
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        return ChatTemplate(source, self.special_tokens, str(self.folder)) if source else None

    def _told_id(self, key: str) -> Any:
        """An id, or a list of them, of generation_config.json, else config.json."""
        for name in ("generation_config.json", "config.json"):
            value = _read_json(self.folder / name).get(key)
            if value is not None:
                return value
        return None

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._core.token_to_id(token)


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; {} when there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}. Copy it again from the model's source.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}, not an object. Copy it again from the model's source.")
    return value


def _content(token: Any) -> str:
    """A special token is told as text, or as {"content": text, ...}."""
    return str(token["content"] if isinstance(token, dict) else token)


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "nothing"
