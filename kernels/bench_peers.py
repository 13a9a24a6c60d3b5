"""INT8 models of others that `bench.py` measures beside ours."""

import copy
import importlib.util
import warnings

import torch

import sqviz


def installed() -> tuple[str, ...]:
    """Which of the optional ones take part."""
    return tuple(name for name in ("torchao", "bitsandbytes") if importlib.util.find_spec(name))


def peers(full: sqviz.LM, half: sqviz.LM) -> dict[str, sqviz.LM]:
    """INT8 models of others: torch's own, and those of torchao and bitsandbytes where they are installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = copy.deepcopy(full.model)
        dynamic = torch.ao.quantization.quantize_dynamic(dynamic, {torch.nn.Linear}, dtype=torch.qint8)
        found = {"torch dynamic INT8": full.replace(model=dynamic)}
        if "torchao" in installed():
            found["torchao"] = full.replace(model=torchao(full))
        if "bitsandbytes" in installed():
            found["bitsandbytes"] = half.replace(model=bitsandbytes(half))
    return found


def torchao(lm: sqviz.LM) -> torch.nn.Module:
    """INT8 weights and activations, steps per channel and per token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(lm.model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def bitsandbytes(lm: sqviz.LM) -> torch.nn.Module:
    """LLM.int8(): outlier channels above 6 stay 16-bit."""
    from bitsandbytes.nn import Linear8bitLt

    model = copy.deepcopy(lm.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            bias = module.bias is not None
            linear = Linear8bitLt(module.in_features, module.out_features, bias, has_fp16_weights=False, threshold=6.0)
            linear.load_state_dict(module.state_dict())
            model.set_submodule(name, linear.to("cpu"))
    return model
