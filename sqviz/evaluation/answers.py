"""Questions inside a stream: is the answer what the model would say at that place? (thesis Table 4.5, Figure 4.6)

The stream holds questions and right answers one after the other. The model reads it under a policy; an answer counts as
right if, at each of its tokens, the most likely token is the right one: exactly then greedy decoding writes it.
"""

import dataclasses

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.streaming.feed import BLOCK, Feed
from sqviz.streaming.policies import Policy


@dataclasses.dataclass(frozen=True, eq=False)
class QuestionStream:
    """A text with answers in it.

    Attributes:
        ids: the text.
        answers: [answer 2] first token of each answer, and the one behind its last.
        starts: first token of what belongs to each question; None where questions do not stand by themselves.
    """

    ids: Int64[Tensor, " token"]
    answers: Int64[Tensor, "answer 2"]
    starts: Int64[Tensor, " answer"] | None = None

    def __post_init__(self) -> None:
        if len(self.answers) == 0:
            raise SqvizError("a stream of questions holds one answer at least")


def score_answers(
    lm: LM,
    stream: QuestionStream,
    policy: Policy,
    *,
    block: int = BLOCK,
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> Bool[Tensor, " answer"]:
    """Whether the model says each answer, reading the stream under a policy.

    Raises what `SinkCache` refuses, and `Cancelled`.
    """
    said = torch.full((len(stream.ids),), -1, dtype=torch.long)
    feed = Feed(lm, stream.ids, policy, block)
    with progress_bar(len(stream.ids), f"answers, {policy}", unit="tokens", cancel=cancel, show=progress) as bar:
        try:
            for before, logits in feed.passes():
                found = logits.argmax(-1).cpu()[: len(stream.ids) - before - 1]
                said[before + 1 : before + 1 + len(found)] = found
                bar.step(feed.read - before)
        finally:
            feed.close()
    right = said == stream.ids
    return torch.stack([right[first:stop].all() for first, stop in stream.answers.tolist()])


@torch.no_grad()
def score_alone(
    lm: LM, stream: QuestionStream, *, shots: int = 1, cancel: CancelToken | None = None, progress: bool = False
) -> Bool[Tensor, " answer"]:
    """Whether the model says each answer when it reads that question alone, behind the `shots` questions before it.

    The baseline of Table 4.5, "one-shot": what a stream should not fall below.

    Raises:
        SqvizError: questions of this stream do not stand by themselves.
        Cancelled: stopped through `cancel`.
    """
    if stream.starts is None:
        raise SqvizError("the questions of this stream refer to what came before; they cannot be asked alone")
    starts, right = stream.starts.tolist(), []
    with progress_bar(len(starts), "answers, one by one", unit="questions", cancel=cancel, show=progress) as bar:
        for number, (first, stop) in enumerate(stream.answers.tolist()):
            begin = starts[max(0, number - shots)]
            part = stream.ids[begin:stop]
            said = lm.model(input_ids=part[None].to(lm.device), use_cache=False).logits[0].argmax(-1).cpu()
            right.append(bool((said[first - begin - 1 : -1] == part[first - begin :]).all()))
            bar.step()
    return torch.tensor(right)
