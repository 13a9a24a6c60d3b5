"""What the cache refuses says how to go on, and leaves the stream where it was."""

import pytest
import torch
from reference import reference, seeing
from streams import error, feed, model, text

import sqviz.streaming.cache as cache_module
from sqviz.errors import SqvizError, UnknownArchitecture
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.policies import Dense, Recompute, Sinks, Window, of_size

LLAMA = model("LlamaForCausalLM")
POLICY = Sinks(2, 5)


class Stream:
    """A stream in the middle of its text; `goes_on` checks that nothing has disturbed it."""

    def __init__(self, lm=LLAMA, policy=POLICY, rows: int = 1) -> None:
        self.lm, self.policy = lm, policy
        self.ids = torch.stack([text(40, seed) for seed in range(rows)])
        self.cache = SinkCache(lm, policy)
        self.got = [feed(lm, self.cache, self.ids[:, :20], [13, 1, 6])]

    def goes_on(self) -> None:
        assert self.cache.get_seq_length() == 20
        self.got.append(feed(self.lm, self.cache, self.ids[:, 20:], [1, 1, 12, 6]))
        for row, ids in enumerate(self.ids):
            expected = reference(self.lm, ids, self.policy.sinks, self.policy.recent)
            assert error(torch.cat(self.got, 1)[row], expected) < 1e-4


# --- models and policies ---


@pytest.mark.parametrize("name", ["OPTForCausalLM", "GPT2LMHeadModel"])
def test_learned_positions(name: str):
    lm = model(name)
    with pytest.raises(
        SqvizError, match=r"cannot be renumbered.*Use a model such as Llama, Pythia, Falcon, MPT or BLO"
    ):
        SinkCache(lm, POLICY)
    assert not lm.model.base_model._forward_pre_hooks


def test_an_unknown_architecture():
    stranger = LLAMA.replace(arch=type(LLAMA.arch)("NewForCausalLM", LLAMA.arch.blocks, LLAMA.arch.inputs))
    with pytest.raises(UnknownArchitecture, match=r"NewForCausalLM.*add a row"):
        SinkCache(stranger, POLICY)


def test_policies_without_a_cache():
    for wrong in (Recompute(8), "sinks", 4):
        with pytest.raises(SqvizError, match=r"keeps no cache; Dense\(\), Window\(n\) and Sinks\(s, r\) do"):
            SinkCache(LLAMA, wrong)
    stream = Stream()
    with pytest.raises(SqvizError, match=r"Recompute\(.*keeps no cache"):
        stream.cache.policy = Recompute(8)
    with pytest.raises(SqvizError, match=r"4 sinks do not fit into a cache of 4"):
        stream.cache.policy = of_size(4)
    with pytest.raises(SqvizError, match=r"recent=0.*1 at least"):
        stream.cache.policy = Window(0)
    stream.goes_on()


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Cohere2ForCausalLM"])
def test_a_sliding_window_smaller_than_the_cache(name: str):
    lm = model(name, sliding_window=12)
    with pytest.raises(
        SqvizError, match=r"see 12 tokens at most.*Use a cache of 12 keys or fewer: sqviz\.Sinks\(4, 8\)"
    ):
        SinkCache(lm, Sinks(4, 9))
    stream = Stream(lm, Sinks(4, 8))
    with pytest.raises(SqvizError, match="sliding_window"):
        stream.cache.policy = Window(13)
    stream.goes_on()


def test_a_sliding_window_that_no_layer_uses_is_none():
    assert SinkCache(model("Qwen2ForCausalLM", sliding_window=6, use_sliding_window=False), Sinks(4, 9))
    assert SinkCache(model("MistralForCausalLM", sliding_window=None), Sinks(4, 9))


ROPE = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(("name", "limit"), [("GPTJForCausalLM", 24), ("LlamaForCausalLM", 23)])
def test_no_more_positions_than_the_model_has_angles_for(name: str, limit: int):
    lm = model(
        name, **({"n_positions": 24} if "GPTJ" in name else {"max_position_embeddings": 24, "rope_parameters": ROPE})
    )
    with pytest.raises(
        SqvizError, match=rf"Sinks\(2, {limit}\) needs {limit + 2} positions and .* has angles for {limit}"
    ):
        SinkCache(lm, Sinks(2, limit))
    cache, ids = SinkCache(lm, Sinks(2, limit - 2)), text(60)
    assert error(feed(lm, cache, ids, [1] * 60), reference(lm, ids, 2, limit - 2)) < 1e-4
    cache, got = SinkCache(lm, Sinks(2, 5)), []
    for part in ids.split(limit - 6):
        got.append(feed(lm, cache, part))
        with pytest.raises(
            SqvizError, match=rf"the window and {limit} new tokens need \d+\..*feed fewer tokens at a time"
        ):
            feed(lm, cache, text(limit))
    assert error(torch.cat(got), reference(lm, ids, 2, 5)) < 1e-4
    dense = SinkCache(lm, Dense())
    feed(lm, dense, ids[:limit], [1] * limit)
    with pytest.raises(SqvizError, match="angles for"):
        feed(lm, dense, ids[:1])


# --- calls ---


def test_another_number_of_rows():
    stream = Stream(rows=2)
    for rows in (1, 3):
        with pytest.raises(
            SqvizError, match=rf"holds 2 rows and was given {rows}\. Use one cache per batch, or reset\(\)"
        ):
            feed(LLAMA, stream.cache, torch.full((rows, 4), 9))
    stream.goes_on()


def test_nothing_to_read():
    stream = Stream()
    for shape in ((1, 0), (0, 3)):
        with pytest.raises(SqvizError, match=rf"nothing to read: {shape[0]} rows of {shape[1]} tokens"):
            stream.lm.model(input_ids=torch.empty(shape, dtype=torch.long), past_key_values=stream.cache)
    with pytest.raises((SqvizError, ValueError), match=r"input_ids.*inputs_embeds"):
        stream.lm.model(past_key_values=stream.cache)
    stream.goes_on()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "FalconForCausalLM/rw"])
def test_padding_elsewhere_than_on_the_left_of_the_beginning(name: str):
    lm, ids = model(name), text(6)[None]
    cache = SinkCache(lm, POLICY)
    for wrong in ([1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]):
        with pytest.raises(SqvizError, match=r"pad on the left \(tokenizer\.padding_side = 'left'\)"):
            feed(lm, cache, ids, attention_mask=torch.tensor([wrong]))
    stream = Stream(lm)
    whole = torch.ones(1, 23, dtype=torch.long)
    for column in (0, 19, 20, 22):
        wrong = whole.clone()
        wrong[0, column] = 0
        with pytest.raises(
            SqvizError, match=r"padding between the tokens of a stream.*pad the first chunk on the left"
        ):
            feed(lm, stream.cache, stream.ids[:, 20:23], attention_mask=wrong)
    stream.goes_on()
    assert error(feed(lm, cache, text(30)), reference(lm, text(30), 2, 5)) < 1e-4  # what was refused left nothing


def test_masks_of_other_kinds():
    stream = Stream()
    for mask in (torch.zeros(1, 1, 2, 22), {"full_attention": None}):
        with pytest.raises(
            SqvizError, match=r"makes its own attention masks; give it the \[batch, token\] padding mask"
        ):
            feed(LLAMA, stream.cache, stream.ids[:, 20:22], attention_mask=mask)
    stream.goes_on()


def test_mpt_refuses_what_differs_by_row():
    lm, ids, mask = model("MptForCausalLM"), torch.stack([text(8, 1), text(8, 2)]), torch.ones(2, 8, dtype=torch.long)
    mask[0, 0] = 0
    cache = SinkCache(lm, POLICY)
    with pytest.raises(SqvizError, match=r"no batch dimension: run texts of different lengths one at a time"):
        feed(lm, cache, ids, attention_mask=mask)
    got = feed(lm, cache, text(30)[None].expand(2, -1))
    assert error(got[1], reference(lm, text(30), 2, 5)) < 1e-4
    with pytest.raises(SqvizError, match=r"no batch dimension: choose sinks by token id one text at a time"):
        feed(lm, SinkCache(lm, Sinks(2, 5, tokens=(7,))), ids)


def test_sinks_by_token_need_ids():
    stream = Stream(policy=Sinks(40, 5))  # still looking for sinks
    stream.cache.policy = Sinks(41, 5, tokens=(9,))
    embedded = LLAMA.model.get_input_embeddings()(stream.ids[:, 20:22])
    with pytest.raises(
        SqvizError, match=r"tokens=\(9,\).*chooses sinks by token id, so the model has to be given input_"
    ):
        LLAMA.model(inputs_embeds=embedded, past_key_values=stream.cache)
    stream.cache.policy = Sinks(40, 5)
    stream.goes_on()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MptForCausalLM"])
def test_use_cache_false_is_a_contradiction(name: str):
    stream = Stream(model(name))
    with pytest.raises(SqvizError, match=r"together with use_cache=False.*Pass use_cache=True"):
        stream.lm.model(input_ids=stream.ids, past_key_values=stream.cache, use_cache=False)
    stream.goes_on()


def test_cropping():
    stream = Stream()
    with pytest.raises(SqvizError, match=r"cannot be cropped: evicted keys are gone. Use reset\(\), or DynamicCache"):
        stream.cache.crop(4)
    stream.goes_on()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "MptForCausalLM", "GPTJForCausalLM"])
def test_another_model_and_a_closed_cache(name: str):
    stream = Stream()
    with pytest.raises(
        SqvizError, match=r"was made for .*used with another model, or after close\(\)\. Make one with Sin"
    ):
        feed(model(name, seed=1), stream.cache, stream.ids[:, 20:22])
    stream.goes_on()
    stream.cache.close()
    with pytest.raises(SqvizError, match=r"after close\(\)"):
        feed(LLAMA, stream.cache, stream.ids[:, :1])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MptForCausalLM"])
def test_another_model_and_a_closed_cache_after_an_interrupt(name: str):
    """PyTorch tells hooks of no KeyboardInterrupt, so the cache still takes the pass for being under way."""
    lm = model(name)
    stream = Stream(lm)
    for end in (stream.goes_on, stream.cache.close):
        with Broken(lm, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            feed(lm, stream.cache, text(3))
        assert stream.cache.kept in (6, 7)
        with pytest.raises(SqvizError, match=r"used with another model, or after close\(\)"):
            feed(model(name, seed=1), stream.cache, text(7))
        end()
    with pytest.raises(SqvizError, match=r"used with another model, or after close\(\)"):
        feed(lm, stream.cache, text(7))


def test_a_model_converted_in_between():
    lm = model("LlamaForCausalLM")
    stream = Stream(lm)
    lm.model.double()
    with pytest.raises(
        SqvizError, match=r"holds torch\.float32 keys on cpu, and the model now gives torch\.float64.*new S"
    ):
        feed(lm, stream.cache, stream.ids[:, 20:22])
    lm.model.float()
    stream.goes_on()
    fresh = SinkCache(lm, POLICY)
    lm.model.double()  # before anything was read
    assert feed(lm, fresh, text(9), [4, 5]).dtype == torch.float64


# --- passes that do not come to an end ---


class Broken:
    """Raises once, in the second block: the first has written its keys by then."""

    def __init__(self, lm, kind: type[BaseException]) -> None:
        self.block, self.kind = list(lm.model.get_submodule(lm.arch.blocks).children())[1], kind

    def __enter__(self) -> None:
        def stop(*_) -> None:
            raise self.kind("broken off")

        self.hook = self.block.register_forward_pre_hook(stop)

    def __exit__(self, *_) -> None:
        self.hook.remove()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "MptForCausalLM", "DeepseekV2ForCausalLM"])
@pytest.mark.parametrize("new", [1, 7])
def test_a_pass_that_breaks_off_is_as_if_it_had_not_been(name: str, kind, new: int, monkeypatch):
    monkeypatch.setattr(cache_module, "SLACK", 2)
    lm, ids, got, seen = model(name), text(40), [], 0
    cache = SinkCache(lm, POLICY)
    for size in (1, 5, 1, 1, 9, 1, 1, 1, 20):  # also before the first token, when sinks come, and when the window moves
        with Broken(lm, kind), pytest.raises(kind, match="broken off"):
            feed(lm, cache, text(new, seed=seen))
        assert cache.get_seq_length() == seen
        got.append(feed(lm, cache, ids[seen : seen + size]))
        seen += size
    assert error(torch.cat(got), reference(lm, ids, 2, 5)) < 1e-4


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "MptForCausalLM"])
def test_a_head_that_fails_takes_back_what_the_blocks_have_read(name: str, monkeypatch):
    monkeypatch.setattr(cache_module, "SLACK", 2)
    lm, ids, got, seen = model(name), text(40), [], 0
    cache = SinkCache(lm, POLICY)
    for size in (1, 5, 1, 1, 9, 1, 1, 1, 20):

        def full(*_):
            raise torch.OutOfMemoryError("no memory for the logits")

        hook = lm.model.get_output_embeddings().register_forward_pre_hook(full)
        with pytest.raises(torch.OutOfMemoryError):
            feed(lm, cache, ids[seen : seen + size])
        hook.remove()
        assert cache.get_seq_length() == seen
        got.append(feed(lm, cache, ids[seen : seen + size]))
        seen += size
    assert error(torch.cat(got), reference(lm, ids, 2, 5)) < 1e-4


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_first_pass_that_breaks_off_does_not_fix_the_shape_of_the_batch(kind):
    cache, mask = SinkCache(LLAMA, POLICY), torch.tensor([[0, 0, 1], [1, 1, 1]])
    with Broken(LLAMA, kind), pytest.raises(kind):
        feed(LLAMA, cache, text(6).view(2, 3), attention_mask=mask)
    assert error(feed(LLAMA, cache, text(30), [9, 21]), reference(LLAMA, text(30), 2, 5)) < 1e-4


@pytest.mark.parametrize("after", [Window(9), Sinks(4, 5), Sinks(1, 3)])
def test_a_policy_changed_after_a_pass_broke_off(after):
    """One key is lost by the attempt, the one that its first query no longer sees; nothing else."""
    ids, cache = text(40), SinkCache(LLAMA, POLICY)
    got = [feed(LLAMA, cache, ids[:20])]
    with Broken(LLAMA, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        feed(LLAMA, cache, ids[20:21])
    cache.policy = after
    got.append(feed(LLAMA, cache, ids[20:], [1, 1, 12, 6]))
    held, keeps = 16, [[s for s in range(2) if s < t - 4] + list(range(max(0, t - 4), t + 1)) for t in range(20)]
    sinks = ([0, 1] + [16, 17] * (after.sinks > 2))[: after.sinks]
    for t in range(20, 40):
        held = max(held, t - after.recent + 1)
        keeps.append([s for s in sinks if s < held] + list(range(held, t + 1)))
    assert error(torch.cat(got), seeing(LLAMA, ids, keeps)) < 1e-4


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("policy", [POLICY, Dense()])
def test_no_memory_while_the_window_moves(policy, failing: int, monkeypatch):
    """The layer at which memory runs out stays as it was; those before it are brought back, or on, by the next call."""
    monkeypatch.setattr(cache_module, "SLACK", 3)
    stream = Stream(policy=policy)
    layer = stream.cache.layers[failing]
    with monkeypatch.context() as patch:

        def full(*_):
            raise torch.OutOfMemoryError("no memory")

        patch.setattr(layer, "move", full)
        with pytest.raises(torch.OutOfMemoryError):
            feed(LLAMA, stream.cache, text(200))
    stream.goes_on()
