"""Watching a model: every input is seen as it is, the result of the model does not change, and no trace is left."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqviz.errors import Cancelled, NoSuchLayer, SqvizError
from sqviz.models.linears import experts, groups, linear_names, weight
from sqviz.models.lm import LM, share
from sqviz.models.tiny import TINY, tiny
from sqviz.observe.hooks import Routing, activations, body, watch
from sqviz.quant.scaled_linear import divide_online

MIXTURES = ("MixtralForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV2ForCausalLM/lite")


def snapshot(model: nn.Module) -> Any:
    """All that a watcher could leave behind: attributes, hooks, flags, tensors (identity, version, content), config."""
    modules = {}
    for name, module in model.named_modules():
        hooks = {
            key: list(value) for key, value in module.__dict__.items() if "hooks" in key and hasattr(value, "keys")
        }
        plain = {key: id(value) for key, value in module.__dict__.items()}
        modules[name] = (type(module), type(module).forward, plain, hooks, module.training)
    tensors = {
        name: (id(t), t.data_ptr(), t._version, t.requires_grad, t.is_inference(), t.clone())
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    return (
        modules,
        tensors,
        copy.deepcopy(model.config.to_dict()),
        getattr(model.config, "_experts_implementation", None),
    )


def assert_untouched(model: nn.Module, before: Any) -> None:
    modules, tensors, config, implementation = before
    now = snapshot(model)
    assert now[0] == modules
    assert now[1].keys() == tensors.keys()
    for name, (*facts, value) in now[1].items():
        assert facts == list(tensors[name][:-1]), name
        assert torch.equal(value, tensors[name][-1]), name
    assert now[2:] == (config, implementation)


def ids(lm: LM, count: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(3, lm.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def logits(lm: LM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return lm.model(tokens[None], use_cache=False).logits


def inputs_of_modules(lm: LM, tokens: Tensor) -> dict[str, Tensor]:
    """The input of every module that is a consumer, by plain hooks on each: the obvious way."""
    seen, handles = {}, []
    for name in linear_names(lm):
        try:
            module = lm.model.get_submodule(name)
        except AttributeError:
            continue  # a parameter of fused experts

        def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = args[0].flatten(0, -2).clone()

        handles.append(module.register_forward_pre_hook(keep))
    logits(lm, tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("architecture", TINY)
def test_every_linear_reads_what_its_groups_first_one_reads(architecture: str) -> None:
    lm = tiny(architecture)
    tokens = ids(lm)
    before, untouched = logits(lm, tokens), snapshot(lm.model)
    seen: dict[str, Tensor] = {}
    with watch(lm, lambda group, x: seen.__setitem__(group.name, x.clone())):
        during = logits(lm, tokens)
    torch.testing.assert_close(during, before, rtol=1e-5, atol=1e-6)
    assert_untouched(lm.model, untouched)
    obvious = inputs_of_modules(lm, tokens)
    assert list(seen) == [group.name for group in groups(lm)]
    for group in groups(lm):
        assert seen[group.name].shape[1] == weight(lm, group.name).shape[1]
        for name in group.consumers:
            if name in obvious:
                torch.testing.assert_close(seen[group.name], obvious[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_inside_fused_experts(architecture: str, implementation: str) -> None:
    """Against the formula for each token and each expert it was sent to, and the logits of each implementation."""
    lm = tiny(architecture)
    lm.model.set_experts_implementation(implementation)
    tokens = ids(lm)
    before = logits(lm, tokens)
    group = next(group for group in groups(lm) if group.kind == "mlp.experts.down_proj")
    module: Any = lm.model.get_submodule(group.name.rpartition(".")[0])
    sent: list[tuple[Tensor, ...]] = []
    rows: list[tuple[Tensor, Routing]] = []
    handle = module.register_forward_pre_hook(lambda _, args: sent.append(args))
    with watch(lm, pytest.fail, [group], routed=lambda _, x, routing: rows.append((x.clone(), routing))):
        during = logits(lm, tokens)
    handle.remove()
    torch.testing.assert_close(during, before, rtol=1e-5, atol=1e-6)
    [(hidden, choice, _)], [(x, routing)] = sent, rows
    assert len(x) == choice.numel()
    pairs = list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    assert sorted(pairs) == sorted((t, int(e)) for t, chosen in enumerate(choice) for e in chosen)
    assert [e for _, e in pairs] == sorted(e for _, e in pairs)
    for row, (token, expert) in zip(x, pairs, strict=True):
        gate, up = (module.gate_up_proj[expert].double() @ hidden[token].double()).chunk(2)
        torch.testing.assert_close(row.double(), nn.functional.silu(gate) * up, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, Cancelled, KeyboardInterrupt])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", *MIXTURES])
def test_an_exception_at_any_group_leaves_no_trace(architecture: str, error: type[BaseException]) -> None:
    lm = tiny(architecture)
    tokens = ids(lm)
    before, untouched = logits(lm, tokens), snapshot(lm.model)
    for stop in groups(lm):

        def callback(group: Any, _: Tensor, stop: Any = stop) -> None:
            if group is not None and group.name == stop.name:
                raise error("stop here")

        with pytest.raises(error, match="stop here"), watch(lm, callback):
            logits(lm, tokens)
        assert_untouched(lm.model, untouched)
    assert torch.equal(logits(lm, tokens), before)


def test_an_instance_that_had_its_own_forward_gets_it_back() -> None:
    """accelerate and others put a function there."""
    lm = tiny("MixtralForCausalLM")
    module: Any = lm.model.get_submodule("model.layers.0.mlp.experts")
    own: Callable[..., Tensor] = module.forward
    module.forward = own
    with watch(lm, lambda *_: None):
        assert module.forward is not own
    assert module.__dict__["forward"] is own


def test_experts_of_another_layout_are_refused_by_name_and_nothing_stays_hooked() -> None:
    lm = tiny("MixtralForCausalLM")
    module: Any = lm.model.get_submodule("model.layers.1.mlp.experts")
    module.has_bias = True
    untouched = snapshot(lm.model)
    with pytest.raises(SqvizError, match=r"layers\.1\.mlp\.experts\.down_proj.*MixtralExperts"), watch(lm, pytest.fail):
        pass
    assert_untouched(lm.model, untouched)


@pytest.mark.parametrize("architecture", TINY)
def test_activations_are_the_inputs(architecture: str) -> None:
    lm = tiny(architecture)
    tokens = ids(lm)
    untouched = snapshot(lm.model)
    names = linear_names(lm)[::-1]
    found = activations(lm, tokens, names)
    assert_untouched(lm.model, untouched)
    assert tuple(found) == names
    obvious = inputs_of_modules(lm, tokens)
    for name, x in found.items():
        assert x.dtype == torch.float32
        assert not x.is_inference()
        if name in obvious:
            torch.testing.assert_close(x, obvious[name], rtol=1e-4, atol=1e-6)
    for group in groups(lm):
        assert all(found[name] is found[group.name] for name in group.consumers)


def test_activations_stop_after_the_last_linear_asked_for() -> None:
    lm = tiny("LlamaForCausalLM")
    reached: list[str] = []
    handles = [
        lm.model.get_submodule(f"model.layers.{index}").register_forward_hook(lambda *_, i=index: reached.append(i))
        for index in range(2)
    ]
    full = activations(lm, ids(lm), linear_names(lm))["model.layers.0.mlp.up_proj"]
    assert reached == [0]
    reached.clear()
    part = activations(lm, ids(lm), ["model.layers.0.mlp.up_proj"], cast=torch.float64)["model.layers.0.mlp.up_proj"]
    for handle in handles:
        handle.remove()
    assert reached == []
    assert part.dtype == torch.float64
    assert torch.equal(part, full.double())


def test_activations_of_a_name_that_is_not_there() -> None:
    with pytest.raises(NoSuchLayer, match=r"gate_prj.*near:.*mlp\.gate_proj"):
        activations(tiny("LlamaForCausalLM"), torch.arange(5), ["model.layers.0.mlp.gate_prj"])


def test_the_body_has_no_head() -> None:
    lm = tiny("LlamaForCausalLM")
    assert body(lm) is lm.model.model


def test_online_smoothing_is_seen_after_the_division() -> None:
    """`lm.scales` says that the input was divided by s; what is seen has to be that."""
    lm = tiny("Olmo2ForCausalLM")
    name = "model.layers.1.mlp.gate_proj"
    s = torch.rand(weight(lm, name).shape[1]) + 0.5
    divided = lm.replace(model=share(lm.model))
    for consumer in (name, "model.layers.1.mlp.up_proj"):
        divide_online(divided.model, consumer, s)
    before, after = (activations(each, ids(lm), [name])[name] for each in (lm, divided))
    torch.testing.assert_close(after, before / s)


def test_an_experts_stack_is_told_from_a_linear() -> None:
    lm = tiny("MixtralForCausalLM")
    assert experts(lm, "model.layers.0.mlp.experts.down_proj") == 5
    assert experts(lm, "model.layers.0.mlp.gate") == 0
