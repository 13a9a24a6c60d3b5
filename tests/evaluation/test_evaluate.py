"""`evaluate`: what it takes, what it gives, how it stops, and how its results are kept."""

import itertools
import json
import math

import pytest
import torch

from sqviz.corpus.source import text
from sqviz.errors import Cancelled, DownloadError, NoTokenizer, SqvizError, TextTooShort, Unavailable
from sqviz.evaluation.evaluate import Evaluation, EvaluationCancelled, evaluate
from sqviz.evaluation.items import Task, choose
from sqviz.evaluation.jobs import predicted_bytes
from sqviz.evaluation.lm_eval_tasks import installed
from sqviz.evaluation.paired import NotComparable
from sqviz.evaluation.perplexity import perplexity, segment_nll
from sqviz.evaluation.result import FORMAT
from sqviz.evaluation.scores import score
from sqviz.evaluation.tasks import CORPORA, TASKS
from sqviz.models.tiny import tiny
from sqviz.progress import CancelToken
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import W8A8

WORDS = "The ferry leaves at noon, unless there is fog — then nobody leaves. " * 12
IDS = torch.randint(3, 131, (101,), generator=torch.Generator().manual_seed(3))
LOCAL = ["lambada", "hellaswag", "piqa", "winogrande", "openbookqa", "rte", "copa", "arc_easy", "mmlu"]
QUIET = {"progress": False}


@pytest.fixture
def files(data):
    return {name: data / f"{name}.jsonl" for name in LOCAL}


# --- perplexity ---


def test_perplexity_is_perplexity(reader):
    found = evaluate(reader, text=WORDS, length=40, **QUIET)
    first, second = found.scores
    assert first.value == pytest.approx(perplexity(reader, WORDS, 40), rel=1e-12)
    assert (first.task, first.metric, second.metric) == ("perplexity", "perplexity", "bits_per_byte")
    parts = list(segment_nll(reader, WORDS, 40))
    assert first.items.tolist() == [float(part.double().sum()) for part in parts]
    assert first.weights.tolist() == [39] * len(parts)
    assert first.count == len(parts)
    assert found["perplexity"] is first
    assert found["perplexity", "bits_per_byte"] is second
    assert evaluate(reader, text=WORDS, length=40, batch=3, **QUIET)["perplexity"].value == pytest.approx(first.value)


def test_bits_per_byte_is_counted_by_hand(reader):
    found = evaluate(reader, text=WORDS, length=40, **QUIET)["perplexity", "bits_per_byte"]
    ids = reader.tokenizer.encode(WORDS)
    bits, count = 0.0, 0
    for place, part in enumerate(segment_nll(reader, WORDS, 40)):
        bits += float(part.double().sum()) / math.log(2)
        count += len(reader.tokenizer.decode(ids[40 * place + 1 : 40 * place + 40]).encode())
    assert found.value == pytest.approx(bits / count, rel=1e-12)
    assert found.shown().endswith("bit/B")


def test_a_character_cut_in_two_counts_as_replacements(reader):
    euro = torch.tensor(reader.tokenizer.encode("€", add_special_tokens=False))
    assert len(euro) == 3
    assert predicted_bytes(reader, torch.stack([euro, euro])).tolist() == [6, 6]  # its two last bytes, by themselves
    assert predicted_bytes(reader, torch.tensor([[5, *euro.tolist()]])).tolist() == [3]
    assert predicted_bytes(tiny("LlamaForCausalLM"), euro[None]) is None


def test_token_ids_without_a_tokenizer_have_no_bytes():
    found = evaluate(tiny("LlamaForCausalLM"), text=IDS, length=25, **QUIET)
    assert found["perplexity"].value == pytest.approx(perplexity(tiny("LlamaForCausalLM"), IDS, 25))
    none = found["perplexity", "bits_per_byte"]
    assert (none.value, none.items, none.shown()) == (None, None, "not available")
    assert "no tokenizer" in none.note
    again = found - found
    assert [row.metric for row in again.rows] == ["perplexity"]


def test_the_embedded_text_is_the_default(reader):
    found = evaluate(reader, length=16, limit=3, **QUIET)
    assert found["perplexity"].count == 3
    assert found["perplexity"].value == pytest.approx(perplexity(reader, text().tokens(reader.tokenizer, 48), 16))
    default = evaluate(reader, length=16, **QUIET)["perplexity"]
    assert default.count == CORPORA["perplexity"].segments == 40
    assert "the first 40 segments" in default.note


def test_text_from_a_file(reader, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(WORDS, encoding="utf-8")
    expected = evaluate(reader, text=WORDS, length=40, **QUIET)["perplexity"].value
    for tasks in (f"perplexity:{file}", {"perplexity": file}, {"wikitext2": file}, {"perplexity": text([WORDS])}):
        assert evaluate(reader, tasks, length=40, **QUIET).scores[0].value == expected
    assert evaluate(reader, {"pg19": file}, length=40, **QUIET).scores[0].task == "pg19"
    limited = evaluate(reader, {"perplexity": file}, length=40, limit=2, **QUIET)
    assert limited["perplexity"].items.tolist() == [
        float(part.double().sum()) for _, part in zip(range(2), segment_nll(reader, WORDS, 40), strict=False)
    ]


# --- tasks ---


def test_tasks_can_be_written_in_several_ways(reader, files):
    many = evaluate(reader, files, **QUIET)
    assert [score.task for score in many.scores if score.metric == "acc"] == LOCAL
    ways = [
        [f"{name}:{file}" for name, file in files.items()],
        [{"lambada": files["lambada"]}, *(TASKS[name].at(files[name]) for name in LOCAL[1:])],
    ]
    for tasks in ways:
        other = evaluate(reader, tasks, batch=4, **QUIET)
        assert [(score.task, score.metric) for score in other.scores] == [(s.task, s.metric) for s in many.scores]
        for one, same in zip(other.scores, many.scores, strict=True):
            assert one.content == same.content
            assert one.value == pytest.approx(same.value, rel=1e-5)
    assert [score.metric for score in many.scores if score.task == "lambada"] == ["acc", "perplexity"]
    assert [score.metric for score in many.scores if score.task == "hellaswag"] == ["acc", "acc_norm"]
    assert evaluate(reader, f"piqa:{files['piqa']}", **QUIET).scores[0].count == 5
    limited = evaluate(reader, f"piqa:{files['piqa']}", limit=2, **QUIET)["piqa"]
    assert torch.equal(limited.items, many["piqa"].items[:2])


def test_a_task_of_ones_own(reader):
    ask = choose("Question: What is the capital of {land}?\nAnswer:", ("{a}", "{b}"), "right")
    rows = [
        {"land": "Peru", "a": "Lima", "b": "Oslo", "right": 0},
        {"land": "Norway", "a": "Lima", "b": "Oslo", "right": 1},
    ]
    task = Task("capitals", {"land": str, "a": str, "b": str, "right": int}, ask, ("acc", "acc_norm"), rows)
    found = evaluate(reader, task, **QUIET)
    assert found["capitals"].count == 2
    turned = task.at([row | {"right": 1 - row["right"]} for row in rows], name="turned")
    other = evaluate(reader, [task, turned], **QUIET)
    assert torch.equal(other["capitals"].items, 1 - other["turned"].items)


class Counted:
    """Counts forward passes of a model while it is entered, and asks for a stop at one of them."""

    def __init__(self, lm, token=None, stop=None):
        self.lm, self.token, self.stop, self.calls = lm, token, stop, 0

    def _note(self, *_):
        self.calls += 1
        if self.calls == self.stop:
            self.token.cancel()

    def __enter__(self):
        self.hook = self.lm.model.register_forward_pre_hook(self._note)
        return self

    def __exit__(self, *_):
        self.hook.remove()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("hellaswak", r"no task 'hellaswak'\. Did you mean 'hellaswag'"),
        ("nonsense", "Known: 'perplexity', 'wikitext2', 'pg19', 'lambada'"),
        ("hellaswak:file.jsonl", "Did you mean 'hellaswag'"),
        ([], "tasks is empty"),
        (["perplexity", 3], "a task is a name, .* not int"),
        (["perplexity", "perplexity"], "perplexity more than once"),
        ("piqa:nowhere.jsonl", "there is no file 'nowhere.jsonl'"),
        ("perplexity:nowhere.txt", "there is no file or folder 'nowhere.txt'"),
        (Task("own", {}, choose("", ("",), lambda row: 0)), "'own' has no source and no counterpart in lm-eval"),
    ],
)
def test_tasks_that_cannot_be_run_stop_before_the_model_runs(reader, files, tasks, message):
    several = [f"rte:{files['rte']}", *(tasks if isinstance(tasks, list) else [tasks])] if tasks else tasks
    with Counted(reader) as counted, pytest.raises(SqvizError, match=message):
        evaluate(reader, several, text=WORDS, length=40, **QUIET)
    assert counted.calls == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit=0"),
        ({"limit": 2.5}, "limit=2.5"),
        ({"batch": 0}, "batch=0"),
        ({"length": 1}, "length=1"),
        ({"length": 1000}, "256 positions"),
        ({"reference": "lm"}, "reference is an LM or an Evaluation, not str"),
        ({"text": 3}, "text must be a string"),
    ],
)
def test_bad_arguments(reader, arguments, message):
    with pytest.raises(SqvizError, match=message):
        evaluate(reader, **{"text": WORDS, "length": 40, **QUIET, **arguments})


def test_text_needs_a_tokenizer(files):
    for tasks in ("perplexity", {"piqa": files["piqa"]}):
        with pytest.raises(NoTokenizer):
            evaluate(tiny("LlamaForCausalLM"), tasks, **QUIET)
    with pytest.raises(TextTooShort):
        evaluate(tiny("LlamaForCausalLM"), text=IDS[:9], length=10, **QUIET)


def test_a_text_on_the_hub_without_a_network(reader):
    with pytest.raises(DownloadError, match=r"hub:Salesforce/wikitext.* cannot be read.* sqviz.text\(\) has embedded"):
        evaluate(reader, "wikitext2", **QUIET)


@pytest.mark.skipif(installed(), reason="lm-eval is installed")
def test_a_task_of_the_hub_without_lm_eval(reader):
    with pytest.raises(Unavailable, match=r"hellaswag: lm-eval is not installed.*pip install 'sqviz\[eval\]'"):
        evaluate(reader, "hellaswag", **QUIET)
    with pytest.raises(SqvizError, match=r"pip install 'sqviz\[eval\]' adds those of lm-eval"):
        evaluate(reader, "gsm8k", **QUIET)


# --- a reference ---


def test_a_quantised_model_against_the_one_it_came_from(reader, files):
    int8 = quantize(reader, W8A8)
    tasks = {"perplexity": text([WORDS]), **files}
    before = {key: tensor.clone() for key, tensor in reader.model.state_dict().items()}
    found = evaluate(int8, tasks, length=40, reference=reader, **QUIET)
    alone = evaluate(reader, tasks, length=40, **QUIET)
    assert all(torch.equal(tensor, before[key]) for key, tensor in reader.model.state_dict().items())
    assert [score.value for score in found.reference.scores] == [score.value for score in alone.scores]
    assert found.comparison == found - alone == found.against(alone)
    assert evaluate(int8, tasks, length=40, reference=alone, **QUIET).comparison == found.comparison
    ratio = found.comparison["perplexity"]
    assert ratio.change == pytest.approx(found["perplexity"].value / alone["perplexity"].value)
    assert found.comparison["piqa"].change == found["piqa"].value - alone["piqa"].value
    assert "W8A8" in found.model
    assert found.comparison.reference == alone.model == reader.name
    assert alone.comparison is None


def test_a_reference_on_other_items_is_refused_before_the_model_runs(reader, files):
    whole = evaluate(reader, files, **QUIET)
    plain = evaluate(reader, text=WORDS, length=40, **QUIET)
    cases = [
        ({"tasks": {"piqa": files["piqa"]}, "limit": 3, "reference": whole}, "piqa: the reference did not see"),
        ({"tasks": {"piqa": files["piqa"]}, "reference": plain}, "none of these tasks: it has perplexity, and piqa"),
        ({"text": WORDS, "length": 41, "reference": plain}, "perplexity: the reference did not see the same items"),
        ({"text": WORDS.upper(), "length": 40, "reference": plain}, "same items"),
    ]
    for arguments, message in cases:
        with Counted(reader) as counted, pytest.raises(NotComparable, match=message):
            evaluate(reader, **arguments, **QUIET)
        assert counted.calls == 0
    with pytest.raises(SqvizError, match=r"against\(\) takes an Evaluation"):
        plain.against(3)
    with pytest.raises(TypeError, match="unsupported operand"):
        plain - 3


def test_the_seed_is_that_of_the_interval(reader, files):
    int8 = quantize(reader, W8A8)
    one, same, other = (
        evaluate(int8, text=WORDS, length=20, reference=reader, seed=seed, **QUIET).comparison["perplexity"]
        for seed in (1, 1, 2)
    )
    assert one == same
    assert (one.low, one.change) != (other.low, other.change)
    assert one.change == other.change


# --- stopping ---


def test_a_cancelled_evaluation_keeps_what_is_finished(reader, files):
    token = CancelToken()
    tasks = {"rte": files["rte"], "piqa": files["piqa"], "copa": files["copa"]}
    whole = evaluate(reader, tasks, **QUIET)
    with Counted(reader, token, stop=8 + 3), pytest.raises(EvaluationCancelled, match="piqa was cancelled") as caught:
        evaluate(reader, tasks, cancel=token, **QUIET)
    assert isinstance(caught.value, Cancelled)
    assert "Finished: rte; their scores are this exception's `partial`" in str(caught.value)
    partial = caught.value.partial
    assert [score.task for score in partial.scores] == ["rte"]
    assert partial["rte"].value == whole["rte"].value
    assert "rte" in repr(partial)


def test_cancelled_while_the_reference_runs(reader, files):
    int8, token = quantize(reader, W8A8), CancelToken()
    tasks = {"rte": files["rte"], "perplexity": text([WORDS])}
    for stop, finished in ((1, None), (9, ["rte"])):
        token = CancelToken()
        with Counted(reader, token, stop), pytest.raises(EvaluationCancelled) as caught:
            evaluate(int8, tasks, length=40, reference=reader, cancel=token, **QUIET)
        partial = caught.value.partial
        assert [score.metric for score in partial.scores] == ["acc", "perplexity", "bits_per_byte"]
        assert finished == (None if partial.reference is None else [score.task for score in partial.reference.scores])
        assert repr(partial)


def test_control_c_keeps_what_is_finished(reader, files):
    def press(*_):
        if next(calls) == 8 + 3:
            raise KeyboardInterrupt

    calls = itertools.count(1)
    hook = reader.model.register_forward_pre_hook(press)
    try:
        with pytest.raises(EvaluationCancelled, match=r"piqa was interrupted\. Finished: rte") as caught:
            evaluate(reader, {name: files[name] for name in ("rte", "piqa", "copa")}, **QUIET)
    finally:
        hook.remove()
    assert [score.task for score in caught.value.partial.scores] == ["rte"]


def test_cancelled_before_it_began(reader):
    token = CancelToken()
    token.cancel()
    with Counted(reader) as counted, pytest.raises(EvaluationCancelled) as caught:
        evaluate(reader, text=WORDS, length=40, cancel=token, **QUIET)
    assert counted.calls == 0
    assert caught.value.partial.scores == ()
    assert str(caught.value) == "perplexity was cancelled. Finished: no task"
    assert repr(caught.value.partial)


# --- the result ---


@pytest.fixture
def result(reader, files):
    return evaluate(
        quantize(reader, W8A8), {"perplexity": text([WORDS]), **files}, length=40, reference=reader, seed=4, **QUIET
    )


def test_to_json_and_back(result, tmp_path):
    path = result.to_json(tmp_path / "int8.json")
    for source in (path, str(path), result.to_json()):
        back = Evaluation.from_json(source)
        assert repr(back) == repr(result)
        assert (back.seed, back.model) == (4, result.model)
        assert back.comparison == result.comparison
        for one, same in zip(back.scores, result.scores, strict=True):
            assert torch.equal(one.items, same.items)
            assert (one.value, one.content, one.seconds) == (same.value, same.content, same.seconds)
    assert json.loads(path.read_text(encoding="utf-8"))["format"] == FORMAT
    assert result.to_html(tmp_path / "page.html").read_text(encoding="utf-8") == result.to_html()
    (tmp_path / "page.html").unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["int8.json"]


def test_infinite_and_missing_values_are_kept():
    infinite = score("t", "perplexity", torch.tensor([900.0]), content="", seconds=0)
    none = evaluate(tiny("LlamaForCausalLM"), text=IDS, length=25, **QUIET)
    written = Evaluation("m", (infinite, *none.scores)).to_json()
    assert "Infinity" not in written
    back = Evaluation.from_json(written)
    assert back["t"].value == math.inf
    assert back["perplexity", "bits_per_byte"].value is None
    assert "inf" in repr(back)


def test_a_file_is_written_as_a_whole_or_not_at_all(result, tmp_path):
    path = tmp_path / "kept.json"
    path.write_text("old", encoding="utf-8")
    broken = Evaluation("m", (score("t", "acc", torch.tensor([1.0]), content="\ud800", seconds=0),))
    with pytest.raises(UnicodeEncodeError):
        broken.to_json(path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["kept.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "says None"),
        ('{"format": "sqviz.evaluation/9"}', "no evaluation in the format 'sqviz.evaluation/1'"),
        (f'{{"format": "{FORMAT}", "model": "m"}}', "damaged evaluation: KeyError"),
        (f'{{"format": "{FORMAT}", "model": "m", "seed": 0, "reference": null, "scores": [{{}}]}}', "damaged"),
    ],
)
def test_what_is_no_saved_evaluation(content, message, tmp_path):
    file = tmp_path / "e.json"
    file.write_text(content, encoding="utf-8")
    for source in (content, file):
        with pytest.raises(SqvizError, match=message):
            Evaluation.from_json(source)
    with pytest.raises(OSError, match="nowhere"):
        Evaluation.from_json("nowhere.json")


def test_it_shows_itself(result):
    frame = result.to_frame()
    assert frame.loc[("piqa", "acc"), "value"] == result["piqa"].value
    assert list(frame.columns) == ["value", "count", "standard_error", "higher_is_better", "seconds", "note"]
    bundle = result._repr_mimebundle_()
    html = bundle["text/html"]
    assert html.count("<table>") == 2
    for words in ("perplexity ↓ lower is better", "accuracy ↑ higher is better", "95 % interval", "verdict", "bit/B"):
        assert words in html
        assert words in bundle["text/plain"]
    assert "style" not in html  # no colours of its own
    with pytest.raises(SqvizError, match="no score 'x'; there are: perplexity perplexity, perplexity bits_per_byte"):
        result["x"]
    page = result.to_html()
    assert page.startswith("<!doctype html>")
    assert html in page
    assert "http" not in page
    assert repr(result["piqa"]).startswith("Score(piqa acc: ")
    assert repr(Evaluation("m", ()))
    assert Evaluation("m", ()).to_frame().empty
