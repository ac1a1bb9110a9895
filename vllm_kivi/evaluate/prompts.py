"""Prompts that hide a fact in a haystack and end with a question about it, and what a right answer is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kivi.evaluate.session import EvalError

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
COLOURS = (
    "AMBER",
    "BLACK",
    "BLUE",
    "BRONZE",
    "GOLDEN",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "RED",
    "SILVER",
    "VIOLET",
    "WHITE",
)
OBJECTS = ("ANCHOR", "BELL", "BRIDGE", "CANDLE", "COMPASS", "FEATHER", "LANTERN", "LADDER", "MIRROR", "PEARL", "ROPE")


@dataclass(frozen=True)
class Task:
    """Text around and in the haystack; {answer} stands for what has to be found."""

    intro: str
    needle: str
    question: str
    answer: str | None  # None: a new random one for each prompt
    extra_tokens: int  # that the model may say before or after the answer
    is_number: bool = False

    def random_answer(self, generator: random.Random) -> str:
        if self.is_number:
            return str(generator.randrange(10_000, 100_000))
        return f"{generator.choice(COLOURS)} {generator.choice(OBJECTS)}"

    def is_right(self, output: str, answer: str) -> bool:
        """A number must come first, whole; anything else may be said with other words around it, in any case."""
        if self.is_number:
            said = output.strip()
            return said.startswith(answer) and not said[len(answer) :][:1].isdigit()
        return " ".join(answer.lower().split()) in " ".join(output.lower().split())


PASSKEY = Task(
    "There is important information hidden in a lot of irrelevant text. Find it and remember it.\n\n",
    "The pass key is {answer}. Remember it. {answer} is the pass key.\n",
    "\nWhat is the pass key? The pass key is",
    None,
    2,
    is_number=True,
)
NEEDLE = Task(
    "Read the text and answer the question about it.\n\n",
    "The secret password of the lighthouse keeper is {answer}.\n",
    "\n\nQuestion: What is the secret password of the lighthouse keeper?\n"
    "Answer: The secret password of the lighthouse keeper is",
    None,
    8,
)


@dataclass(frozen=True)
class Prompt:
    """Tokens whose answer is `answer`; the needle is at positions `start` to `stop`."""

    tokens: list[int]
    answer: str
    length: int
    depth: float
    start: int
    stop: int


def sentence_ends(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """Where a needle may go in: the start, the end, and after each token that ends a sentence or a line."""
    ends = {
        token
        for token in set(tokens)
        if tokenizer.decode([token]).rstrip(" \"'\u201d\u2019").endswith((".", "!", "?", "\n"))
    }
    return sorted({0, len(tokens), *(i for i, token in enumerate(tokens, 1) if token in ends)})


def build_prompts(
    task: Task,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    tokenizer: Any,
    haystack: Sequence[int],
) -> list[Prompt]:
    """Prompts of exactly these lengths, length by length; their text begins anywhere in the haystack.

    Raises:
        EvalError: a length that does not hold the question, or is longer than the text.
    """
    generator = random.Random(seed)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    head, question = [*tokenizer.encode(""), *encode(task.intro)], encode(task.question)
    prompts = []
    for length in lengths:
        for depth in depths:
            for _ in range(samples):
                answer = task.answer or task.random_answer(generator)
                needle = encode(task.needle.replace("{answer}", answer))
                room = length - len(head) - len(needle) - len(question)
                if room < 1:
                    raise EvalError(f"--lengths {length} is too short: question and needle take {length - room} tokens")
                if room > len(haystack):
                    raise EvalError(f"--lengths {length} is longer than the text of {len(haystack)} tokens")
                first = generator.randrange(len(haystack) - room + 1)
                hay = list(haystack[first : first + room])
                at = min(sentence_ends(tokenizer, hay), key=lambda end: abs(end - depth * room))
                tokens = [*head, *hay[:at], *needle, *hay[at:], *question]
                start = len(head) + at
                prompts.append(Prompt(tokens, answer, length, depth, start, start + len(needle)))
    return prompts
