"""The same numbers as lm-eval: its own task files on local questions, and its own model class on the same model.

Skipped without lm-eval, which is no requirement of sqviz: pip install 'sqviz[eval]'.
"""

import copy
import json
from pathlib import Path

import pytest
import torch

from sqviz.errors import Cancelled, DownloadError, NoTokenizer, SqvizError
from sqviz.evaluation.evaluate import EvaluationCancelled, evaluate
from sqviz.evaluation.lm_eval_adapter import adapter, generate
from sqviz.evaluation.lm_eval_tasks import installed, known_names, load
from sqviz.evaluation.tasks import TASKS
from sqviz.models.tiny import tiny
from sqviz.progress import CancelToken
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, W8A8

pytestmark = pytest.mark.skipif(not installed(), reason="lm-eval is not installed (pip install 'sqviz[eval]')")

QUIET = {"progress": False}
OWN = {  # the file with lm-eval's own task, below its folder `tasks`
    "lambada": "lambada/lambada_openai",
    "hellaswag": "hellaswag/hellaswag",
    "piqa": "piqa/piqa",
    "winogrande": "winogrande/default",
    "openbookqa": "openbookqa/openbookqa",
    "rte": "glue/rte/default",
    "copa": "super_glue/copa/default",
    "arc_easy": "arc/arc_easy",
    "mmlu": "mmlu/default/mmlu_elementary_mathematics",
}


@pytest.fixture
def theirs(data, tmp_path):
    """Writes lm-eval's own task with our questions in place of its data set, and returns the file."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent

    def write(name, source=None, **changes):
        file = str(source or data / f"{name}.jsonl")
        splits = dict.fromkeys(("train", "validation", "test", "dev"), file)
        task = {
            "include": str(folder / f"{OWN[name]}.yaml"),
            "task": f"theirs_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": splits, "cache_dir": str(tmp_path / "cache")},
            **changes,
        }
        written = tmp_path / f"theirs_{name}.yaml"
        written.write_text(json.dumps(task), encoding="utf-8")  # YAML holds JSON
        return str(written)

    return write


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def models(request, make_reader):
    lm = make_reader(add_bos=request.param)
    return lm, quantize(lm, SMOOTHQUANT_LLAMA)


@pytest.mark.parametrize("name", OWN)
def test_local_questions_score_as_in_lm_eval(models, theirs, data, name):
    for lm in models:
        ours = evaluate(lm, f"{name}:{data / name}.jsonl", **QUIET)
        other = evaluate(lm, theirs(name), **QUIET)
        assert {score.metric for score in other.scores} == {score.metric for score in ours.scores}
        for score in other.scores:
            same = ours[name, score.metric]
            assert score.items.tolist() == pytest.approx(same.items.tolist(), rel=1e-6)
            assert score.value == pytest.approx(same.value, rel=1e-6)
            assert (score.task, score.higher_is_better) == (f"theirs_{name}", same.higher_is_better)


@pytest.mark.parametrize("name", OWN)
def test_prompts_are_those_of_lm_eval(theirs, data, name):
    loaded = load(name, theirs(name)).loaded
    (task,) = loaded["tasks"].values()
    items = TASKS[name].at(data / f"{name}.jsonl").items()
    assert [pair for item in items for pair in item.pairs] == [tuple(request.args) for request in task.instances]


def test_the_standard_error_is_that_of_lm_eval(theirs, reader):
    import lm_eval

    path = theirs("piqa")
    found = lm_eval.simple_evaluate(model=adapter(reader), tasks=[path], bootstrap_iters=10)["results"]["theirs_piqa"]
    score = evaluate(reader, path, **QUIET)["theirs_piqa"]
    assert score.value == found["acc,none"]
    assert score.standard_error == pytest.approx(found["acc_stderr,none"])


@pytest.mark.parametrize(
    ("name", "add_bos", "limit"),
    [
        ("LlamaForCausalLM", False, 40),
        ("LlamaForCausalLM", True, 40),
        ("GPT2LMHeadModel", False, 40),
        ("BloomForCausalLM", False, None),
    ],
)
def test_their_model_class_says_the_same(make_reader, name, add_bos, limit):
    from lm_eval.models.huggingface import HFLM

    rest = {} if name == "BloomForCausalLM" else {"max_position_embeddings": limit}
    lm = make_reader(name, add_bos=add_bos, **rest)
    # With its cache of logits HFLM 0.4.13 gives other sums for texts that repeat themselves than it does without.
    other = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=3, device="cpu", logits_cache=False)
    own = adapter(lm, batch=4)
    pairs = [
        ("The baker opened", " the oven"),
        ("", " the oven"),
        ("", "<s> hm"),
        ("Trailing  ", "word here"),
        ("<s>Already", " begun"),
        ("A", " B"),
        ("A", " C"),
        ("x " * 60, " and the end of it"),
        ("café —", "  über"),
    ]
    there, here = (model.loglikelihood(requests("loglikelihood", pairs)) for model in (other, own))
    assert [value for value, _ in here] == pytest.approx([value for value, _ in there], rel=1e-5)
    assert [greedy for _, greedy in here] == [greedy for _, greedy in there]
    texts = [("short",), ("word " * 100,), ("abc " * 39,), ("The ferry leaves at noon. " * 9,)]
    there, here = (model.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for model in (other, own))
    assert here == pytest.approx(there, rel=1e-5)
    prompts = [
        ("The baker", {"until": ["e"], "max_gen_toks": 12}),
        ("The ferry leaves " * 9, {"until": "\n\n", "max_gen_toks": 20, "do_sample": False}),
        ("tea", {"max_gen_toks": 16, "until": [], "temperature": 0.0}),
    ]
    there, here = (model.generate_until(requests("generate_until", prompts)) for model in (other, own))
    assert here == there


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, copy.deepcopy(one), 0) for one in arguments]


def test_generation_is_the_most_likely_token_again_and_again(reader):
    ids = reader.tokenizer.encode("The ferry")
    for _ in range(6):
        ids.append(int(reader.model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = reader.tokenizer.decode(ids[-6:])
    assert generate(reader, "The ferry", {"max_gen_toks": 6}) == said
    assert generate(reader, "The ferry", {"max_gen_toks": 6, "until": [said[3]]}) == said[:3]
    assert generate(reader, "", {"max_new_tokens": 1}) is not None
    assert generate(quantize(reader, W8A8), "The ferry", {"max_gen_toks": 3}) is not None
    for settings in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}):
        with pytest.raises(SqvizError, match="only greedy decoding"):
            generate(reader, "The ferry", settings)
    with pytest.raises(SqvizError, match="256 new tokens leave no room"):
        generate(reader, "The ferry", {})
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        generate(reader, "The ferry", {"max_gen_toks": 6}, token)


def test_perplexity_of_documents_pairs_by_bytes(reader, theirs, tmp_path):
    file = tmp_path / "texts.jsonl"
    texts = ["The ferry leaves at noon.", "café", "A longer text with more words in it, and a full stop."]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    metrics = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    changes = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    path = theirs("lambada", file, **changes, metric_list=metrics, should_decontaminate=False)
    found = evaluate(reader, path, **QUIET)
    bits = found["theirs_lambada", "bits_per_byte"]
    assert bits.weights.tolist() == [len(text.encode()) for text in texts]
    assert 2**bits.value == pytest.approx(found["theirs_lambada", "byte_perplexity"].value)
    assert not any(score.higher_is_better for score in found.scores)
    other = evaluate(quantize(reader, W8A8), path, reference=found, **QUIET).comparison
    assert len(other.rows) == 3


def test_a_metric_that_is_no_mean_has_a_value_and_no_items(reader, theirs):
    path = theirs("rte", metric_list=[{"metric": "acc"}, {"metric": "f1"}])
    found = evaluate(reader, path, **QUIET)
    assert found["theirs_rte"].items is not None
    assert found["theirs_rte", "f1"].items is None
    assert "cannot be paired" in found["theirs_rte", "f1"].note


def test_answers_that_are_written(reader, theirs):
    changes = {
        "output_type": "generate_until",
        "doc_to_target": "{{sol1}}",
        "doc_to_choice": None,
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    }
    found = evaluate(reader, theirs("piqa", **changes), limit=2, **QUIET)
    assert found["theirs_piqa", "exact_match"].items.tolist() == [0, 0]


def test_a_group_is_one_score(reader, data, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    rows = (data / "mmlu.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    parts = []
    for name, part in (("one", rows[:1]), ("two", rows[1:])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(part), encoding="utf-8")
        parts.append(
            {
                "task": f"part_{name}",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc"}],
            }
        )
    tasks = {}
    for by_size in (True, False):
        means = [{"metric": "acc", "weight_by_size": by_size}]
        group = {"group": "both", "task": parts, "aggregate_metric_list": means}
        folder = tmp_path / str(by_size)
        folder.mkdir()
        (folder / "both.yaml").write_text(json.dumps(group), encoding="utf-8")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        monkeypatch.setattr("sqviz.evaluation.lm_eval_tasks._manager", lambda manager=manager: manager)
        tasks[by_size] = load("both", "both")
    (score,), leaves = (tasks[by_size].run(reader, 1, None, False) for by_size in (True, False))
    assert (tasks[True].names, tasks[False].names[0]) == (("both",), leaves[0].task)
    assert [leaf.count for leaf in leaves] == [1, 2]
    assert score.items.tolist() == [value for leaf in leaves for value in leaf.items.tolist()]
    assert (score.task, score.count) == ("both", 3)
    assert score.value == pytest.approx(sum(score.items.tolist()) / 3)


def test_pairing_refuses_other_questions_before_the_model_runs(reader, theirs):
    path = theirs("piqa")
    whole = evaluate(reader, path, **QUIET)
    assert evaluate(quantize(reader, W8A8), path, reference=whole, **QUIET).comparison["theirs_piqa"].count == 5
    with pytest.raises(SqvizError, match="theirs_piqa: the reference did not see the same items"):
        evaluate(reader, path, limit=2, reference=whole, **QUIET)


def test_the_random_state_is_left_alone(reader, theirs):
    state = torch.get_rng_state()
    evaluate(reader, theirs("rte"), **QUIET)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_loaded(reader, data):
    assert {task.harness for task in TASKS.values()} <= set(known_names("x"))
    with pytest.raises(
        DownloadError, match=r"hellaswag: its data set cannot be read.*\{'hellaswag': 'questions.jsonl'\}"
    ):
        evaluate(reader, "hellaswag", **QUIET)
    with pytest.raises(SqvizError, match=r"no task 'gsm9k'\. Did you mean .*'gsm8k'.*lm-eval has no task of that name"):
        evaluate(reader, "gsm9k", **QUIET)
    with pytest.raises(SqvizError, match=r"nowhere: lm-eval cannot load this task: .*nowhere.yaml"):
        evaluate(reader, "nowhere.yaml", **QUIET)
    with pytest.raises(NoTokenizer):
        evaluate(tiny("LlamaForCausalLM"), "hellaswag", **QUIET)


def test_cancel(reader, theirs, data):
    token = CancelToken()
    hook = reader.model.register_forward_pre_hook(lambda *_: token.cancel())
    try:
        with pytest.raises(EvaluationCancelled) as caught:
            evaluate(reader, theirs("piqa"), cancel=token, **QUIET)
    finally:
        hook.remove()
    assert caught.value.partial.scores == ()
