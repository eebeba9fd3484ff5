"""A model's chat template: turns to text, as transformers renders it, in jinja2's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamopd.errors import UserError
from streamopd.schemas import Turn


class ChatTemplate:
    """One compiled template; templates come with models, so they are untrusted code."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        self.special_tokens = special_tokens
        self.origin = origin
        self._template = _compile(source, origin)

    def text(self, turns: Sequence[Turn]) -> str:
        """The conversation with the opening of an assistant's turn at its end. UserError when the template refuses it."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self.special_tokens
            )
        except (TemplateError, TypeError, LookupError, ValueError, ArithmeticError) as error:  # its refusal, or its own slip
            roles = ", ".join(turn.role for turn in turns)
            raise UserError(
                f"The chat template of {self.origin} refuses a conversation of the roles {roles}: {error}. "
                "Change the turns (the data, data.system_prompt or teacher_prompt), or the template in that folder."
            ) from None


class GenerationBlock(Extension):
    """`{% generation %}` marks an assistant's words for training masks; a prompt needs the words, not the mark."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _compile(source: str, origin: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise UserError(f"The chat template of {origin} is not valid jinja: {error}. Mend it in that folder.") from None


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """jinja2's own filter escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
