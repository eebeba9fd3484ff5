"""Make the quickstart's teacher and student from nothing: about four minutes of one CPU core.

    python recipes/make_quickstart_models.py                    writes both into streamopd/assets/
    python recipes/make_quickstart_models.py --only student --out DIR
    python recipes/make_quickstart_models.py --untrained DIR    a random teacher, to see a run that cannot work

Both are Llama models of 494,848 parameters over 19 characters that write chain sums with their working. The teacher
knows 2-7 terms; the student has only ever seen 2-3 and stops there, which is what distillation has to mend. The
held-out questions of the quickstart never occur in training. The same seed and step counts on the same machine and
torch give the same weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from msgspec import Struct
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from streamopd.prompts.chain_sum import ChainSum, work_out
from streamopd.prompts.drawn import draw_heldout
from streamopd.prompts.question import Question

PAD, BOS, EOS = 0, 1, 2
SPECIALS = ("<pad>", "<s>", "</s>")
CHARACTERS = "0123456789+-=,; "
VOCABULARY = {token: index for index, token in enumerate((*SPECIALS, *CHARACTERS))}
ASSETS = Path(__file__).resolve().parent.parent / "streamopd" / "assets"
HELDOUT = draw_heldout(ChainSum(), 256)
LONGEST_ANSWER = 33  # tokens, EOS included
BATCH = 128


class Lesson(Struct, frozen=True):
    """One schedule over one range of questions."""

    terms: tuple[int, int]
    steps: int
    lr: float

    def lr_at(self, step: int) -> float:
        """30 steps of warm-up, constant to 30 %, then a cosine down to 2 %."""
        done = step / self.steps
        fall = 1.0 if done < 0.3 else max(0.02, 0.5 * (1 + math.cos(math.pi * (done - 0.3) / 0.7)))
        return self.lr * min(1.0, (step + 1) / 30) * fall


class Pupil(Struct, frozen=True):
    """A model by its seed and its lessons."""

    name: str
    seed: int
    lessons: tuple[Lesson, ...]


PUPILS = (
    Pupil("quickstart-teacher", 0, (Lesson((2, 6), 295, 3e-3), Lesson((2, 7), 224, 2e-3))),
    Pupil("quickstart-student", 5, (Lesson((2, 3), 215, 3e-3),)),
)


def main() -> None:
    """Make what the command line asks for, and say how well it answers the held-out questions."""
    arguments = read_arguments()
    torch.set_num_threads(1)
    if arguments.untrained:
        save(fresh_model(seed=0), arguments.untrained)
        return
    for pupil in PUPILS:
        if arguments.only in (None, pupil.name.removeprefix("quickstart-")):
            model = teach(pupil)
            save(model, arguments.out / pupil.name)
            print(f"{pupil.name}: {accuracy(model, HELDOUT):.3f} of {len(HELDOUT)} held-out questions, greedy", flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the quickstart's teacher and student.")
    parser.add_argument("--only", choices=("teacher", "student"))
    parser.add_argument("--out", type=Path, default=ASSETS, help="the folder that gets one folder for each model")
    parser.add_argument("--untrained", type=Path, metavar="DIR", help="write a randomly initialised model there instead")
    return parser.parse_args()


# ---------------------------------------------------------------- what a model and its tokenizer are
def fresh_model(seed: int) -> LlamaForCausalLM:
    """Three layers of width 128 with tied embeddings, float32, randomly initialised."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
            initializer_range=128**-0.5, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        )
    )
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return model


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One id a character; BOS is put in front by the tokenizer itself."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=SPECIALS[PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=128,
    )


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """An HF folder that AutoModelForCausalLM and AutoTokenizer open."""
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner only, but a container runs as somebody else


# ---------------------------------------------------------------- training
def teach(pupil: Pupil) -> LlamaForCausalLM:
    """A model after its lessons, each with an optimizer of its own."""
    model = fresh_model(pupil.seed)
    for number, lesson in enumerate(pupil.lessons):
        run_lesson(model, lesson, questions(lesson, f"{pupil.name}/{number}"))
    return model


def questions(lesson: Lesson, stream: str) -> Iterable[Question]:
    """Endless questions of a lesson, the held-out ones left out."""
    low, high = lesson.terms
    task = ChainSum(min_terms=low, max_terms=high)
    taboo = {question.text for question in HELDOUT}
    index = 0
    while True:
        question = task.draw(stream, index)
        index += 1
        if question.text not in taboo:
            yield question


def run_lesson(model: LlamaForCausalLM, lesson: Lesson, source: Iterable[Question]) -> None:
    """Cross-entropy on the answers, one update a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lesson.lr, betas=(0.9, 0.98), weight_decay=0.05)
    stream = iter(source)
    for step in range(lesson.steps):
        for group in optimizer.param_groups:
            group["lr"] = lesson.lr_at(step)
        loss = answer_loss(model, [next(stream).text for _ in range(BATCH)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            low, high = lesson.terms
            print(f"{low}-{high} terms, step {step + 1} of {lesson.steps}: loss {loss.item():.4f}", flush=True)


def answer_loss(model: LlamaForCausalLM, texts: list[str]) -> Tensor:
    """Mean cross-entropy over answer tokens, EOS included. Right padding needs no mask: attention is causal."""
    rows = [[BOS, *spell(text), *spell(work_out(text)), EOS] for text in texts]
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    first_B1 = torch.tensor([[len(text) + 1] for text in texts])  # where the answer begins; BOS stands before the question
    wanted_BT = ids_BT[:, 1:]
    of_answer_BT = (torch.arange(1, width) >= first_B1) & (wanted_BT != PAD)
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return cross_entropy(logits_BTV[of_answer_BT], wanted_BT[of_answer_BT])


def spell(text: str) -> list[int]:
    return [VOCABULARY[character] for character in text]


# ---------------------------------------------------------------- how good it is
@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, asked: list[Question]) -> float:
    """Share of greedy answers that stop by themselves with the right number after their last `=`."""
    tokenizer = character_tokenizer()
    prompt = tokenizer([question.text for question in asked], padding=True, return_tensors="pt")
    ids_BT = model.generate(
        input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], do_sample=False, max_new_tokens=LONGEST_ANSWER
    )
    answers_BG = ids_BT[:, prompt["input_ids"].shape[1] :]
    stopped = (answers_BG == EOS).any(1).tolist()
    texts = tokenizer.batch_decode(answers_BG, skip_special_tokens=True)
    right = [end and text.split("=")[-1] == q.solution for end, text, q in zip(stopped, texts, asked, strict=True)]
    return sum(right) / len(asked)


if __name__ == "__main__":
    main()
