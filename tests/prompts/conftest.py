"""A byte-level tokenizer with a chat template, made on the spot; transformers reads the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are Byte.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {%- if loop.index0 > 40 %}{% break %}{% endif %}
    {%- if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
{{ '<|im_start|>' + message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}{% endgeneration %}{% else %}\
{{ message['content'] }}{% endif %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_chat_folder(folder: Path, template: str) -> Path:
    """An HF folder of a byte-level tokenizer: a BOS of its own, `<|im_end|>` ends an answer."""
    specials = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    tokenizer.add_special_tokens(specials)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    stop = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}  # one of the two ways to write a token
    said = {"bos_token": "<|bos|>", "eos_token": stop, "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    return write_chat_folder(tmp_path / "chat", CHATML)
