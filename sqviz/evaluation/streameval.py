"""StreamEval (thesis §4.4.3, Figures 4.6 and 4.7): remember what stood a few lines ago, for ever.

    line 7: the number of maple is <48213>        a new fact in every line
    What is the number of <word>? <48213>         every `every` lines, about the line `back` lines before

Seeded, so that two models read the same lines. Exact match, by place of the question in the stream.
"""

import random
from typing import Any

import torch

from sqviz.errors import NoTokenizer, SqvizError
from sqviz.evaluation.answers import QuestionStream
from sqviz.models.lm import LM

WORDS = (  # noqa: SIM905 - a list of 123 strings reads worse
    "amber anchor apple arrow autumn badge bamboo basin beacon birch blanket bottle branch bridge button cabin "
    "candle canyon carpet castle cedar chain cherry circle cliff clover coast copper corner cotton crane "
    "crystal desert diamond dragon eagle ember engine fabric falcon feather field flute forest fountain galaxy "
    "garden ginger glacier granite hammer harbor hazel helmet honey horizon island ivory jacket jasmine jungle "
    "kettle ladder lantern lemon lily lotus magnet maple marble meadow mirror monkey mountain needle ocean "
    "olive orange orchid otter palace panther paper pearl pepper piano pillow pine planet plum pocket prairie "
    "quartz rabbit raven ribbon river rocket saddle saffron shadow shell silver spider spruce stone summer "
    "sunset thunder tiger timber tower tulip tunnel valley velvet violet walnut whale willow window winter wolf "
).split()


def streameval(
    lm: LM, lines: int = 1000, *, every: int = 10, back: int = 20, digits: int = 5, seed: int = 0
) -> QuestionStream:
    """A stream of `lines` facts with a question after every `every` of them.

    Args:
        lm: the model whose tokenizer is used.
        lines: number of facts.
        every: facts between two questions; 10 in the thesis.
        back: how many lines before its question the asked fact stood; 20 in the thesis.
        digits: of a number.
        seed: of words and numbers.

    Raises:
        NoTokenizer: the model has none.
        SqvizError: lines, every, back or digits that leave nothing to ask.
    """
    if lm.tokenizer is None:
        raise NoTokenizer(f"{lm.name} has no tokenizer, and StreamEval is text")
    if min(lines, every, back, digits) < 1 or lines <= back or back > len(WORDS):
        raise SqvizError(
            f"lines={lines}, every={every}, back={back}, digits={digits}: all at least 1, back at most {len(WORDS)}, "
            "and more lines than back"
        )
    chance = random.Random(seed)
    facts: list[tuple[str, str]] = []
    ids: list[int] = []
    answers: list[tuple[int, int]] = []
    for line in range(lines):
        taken = {word for word, _ in facts[-back:]}
        word = chance.choice([word for word in WORDS if word not in taken])
        facts.append((word, "".join(chance.choice("0123456789") for _ in range(digits))))
        _add(lm, ids, f"line {line + 1}: the number of {word} is {facts[-1][1]}.\n")
        if (line + 1) % every == 0 and line + 1 > back:
            asked, number = facts[line + 1 - back]
            _add(lm, ids, f"What is the number of {asked}? The number of {asked} is")
            first = len(ids)
            _add(lm, ids, f" {number}")
            answers.append((first, len(ids)))
            _add(lm, ids, ".\n")
    return QuestionStream(torch.tensor(ids), torch.tensor(answers).reshape(-1, 2))


def _add(lm: LM, ids: list[int], text: str) -> None:
    tokenizer: Any = lm.tokenizer
    ids.extend(tokenizer(text, add_special_tokens=False)["input_ids"])
