"""A model that executes in integers as a folder: `save_int8`, `load_int8`. No float weight is made on the way back.

    model.safetensors   for each quantised linear NAME.codes int8 [out channel], NAME.step, NAME.bias; NAME.input_step
                        if static, NAME.input_divisor if scaled online; all else under its own name, as it is
    sqviz_int8.json     which linears make one product, which norms and MLPs are fused, and how inputs are quantised
    config.json, …      as transformers and the tokenizer write them

Codes are kept as `spec` lays them out, so a folder written with one backend is read with another.
"""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from sqviz_kernels.backend import Backend
from sqviz_kernels.dispatch import backend_for
from torch import Tensor, nn

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.models.load import wrap
from sqviz.quant import int8_attention
from sqviz.quant.execute import finish
from sqviz.quant.folder import filled, new_place, write_companions
from sqviz.quant.kept_sinks import sinks_of
from sqviz.quant.w8a8 import Fixed, GatedMLP, Product, Site, W8A8Embedding, W8A8Linear, W8A8Norm, gated, merged
from sqviz.quant.w8a8_experts import Stack, W8A8Experts
from sqviz.tensorfile import write_tensors

STRUCTURE, TENSORS, FORMAT = "sqviz_int8.json", "model.safetensors", 1


def save_int8(lm: LM, folder: str | Path) -> Path:
    """Write a model made by `sqviz.quantize(…, backend=…)` into a new folder; it is there whole or not at all.

    Raises `SqvizError` if the model does not execute in integers, keeps sinks, or the folder is there already,
    `OSError` if it cannot be written.
    """
    if not any(isinstance(module, W8A8Linear) for module in lm.model.modules()):
        raise SqvizError(f"{lm!r} does not execute in integers: quantise it with backend='auto' first.")
    if sinks_of(lm) is not None:
        raise SqvizError(
            f"{lm!r} keeps sinks in full precision, which this format has no place for. Save a model without them: "
            "quantise what keep_sinks was called on."
        )
    target = new_place(folder)
    structure, tensors = _describe(lm)
    with filled(target, sum(tensor.nbytes for tensor in tensors.values())) as part:
        write_companions(lm, part)
        write_tensors(tensors, {"format": "pt"}, part / TENSORS)
        (part / STRUCTURE).write_text(json.dumps(structure, indent=1))
    return target


def load_int8(folder: str | Path, backend: str = "auto", device: str | torch.device = "cpu") -> LM:
    """Read what `save_int8` wrote.

    Raises `SqvizError` if the folder holds none or one of a newer format, `Unavailable` for a backend that cannot run.
    """
    place = Path(folder)
    if not (place / STRUCTURE).exists():
        raise SqvizError(f"{str(place)!r} holds no {STRUCTURE}: it was not written by sqviz.save_int8.")
    structure = json.loads((place / STRUCTURE).read_text())
    if structure.get("format") != FORMAT:
        raise SqvizError(f"{place / STRUCTURE} has format {structure.get('format')!r}; this sqviz reads {FORMAT}.")
    device = torch.device(device)
    with safe_open(place / TENSORS, framework="pt", device=str(device)) as file:
        model = _Builder(place, structure, file, backend_for(backend, device)).build()
    return wrap(model.to(device), _tokenizer(place)).replace(note=structure["note"])


# --- writing ---


def _describe(lm: LM) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The structure and the tensors of a model."""
    groups: dict[int, dict[str, Any]] = {}
    sites: dict[int, str] = {}
    norms: dict[str, Any] = {}
    mlps: list[str] = []
    mixtures: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, module in lm.model.named_modules():
        if isinstance(module, W8A8Linear):
            entry = groups.setdefault(id(module.product), {"linears": [], "gated": module.product.gated})
            entry["linears"].append(name)
            entry["site"] = sites.setdefault(id(module.site), module.site.names[0])
            entry["share"] = module.site.share
            tensors |= _linear(name, module)
        elif isinstance(module, W8A8Norm):
            norms[name] = {"kind": module.kind, "eps": module.eps, "plus_one": module.plus_one, "read_by": ""}
        elif isinstance(module, GatedMLP):
            mlps.append(name)
        elif isinstance(module, W8A8Experts):
            mixtures[name] = {"silu": module.is_silu}
            for leaf in ("gate_up_proj", "down_proj"):
                stack = getattr(module, leaf)
                if isinstance(stack, Stack):
                    mixtures[name][leaf] = _stack(f"{name}.{leaf}", stack, tensors)
    for name, norm in ((name, lm.model.get_submodule(name)) for name in norms):
        norms[name]["read_by"] = cast(Site, norm.site).names[0]
    tensors |= _floats(lm.model)
    embedding = [module for module in lm.model.modules() if isinstance(module, W8A8Embedding)]
    structure = {
        "format": FORMAT,
        "note": lm.note,
        "products": list(groups.values()),
        "norms": norms,
        "mlps": mlps,
        "experts": mixtures,
        "tied_embedding": bool(embedding),
        "embedding_dtype": str(embedding[0].dtype).removeprefix("torch.") if embedding else None,
        "attention": int8_attention.uses(lm),
    }
    return structure, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _linear(name: str, linear: W8A8Linear) -> dict[str, Tensor]:
    rows, product = slice(linear.start, linear.stop), linear.product
    found = {f"{name}.codes": product.codes()[rows].clone()}
    found[f"{name}.step"] = product.step.clone() if len(product.step) == 1 else product.step[rows].clone()
    if linear.bias is not None:
        found[f"{name}.bias"] = linear.bias.clone()
    return found | _site(name, linear.site)


def _site(name: str, site: Site) -> dict[str, Tensor]:
    both = {f"{name}.input_step": site.step, f"{name}.input_divisor": site.divisor}
    return {key: tensor.clone() for key, tensor in both.items() if tensor is not None}


def _stack(name: str, stack: Stack, tensors: dict[str, Tensor]) -> dict[str, Any]:
    products, sites = cast(list[Product], list(stack.products)), cast(list[Site], list(stack.sites))
    tensors[f"{name}.codes"] = torch.stack([product.codes() for product in products])
    tensors[f"{name}.step"] = torch.stack([product.step for product in products])
    if sites[0].step is not None:
        tensors[f"{name}.input_step"] = torch.stack([cast(Tensor, site.step) for site in sites])
    return {"gated": products[0].gated, "share": sites[0].share}


def _floats(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of everything that is not quantised, tied ones once."""
    inside = {id(t) for m in model.modules() if isinstance(m, Fixed) for t in (*m.parameters(), *m.buffers())}
    kept: dict[int, tuple[str, Tensor]] = {}
    for module_name, module in model.named_modules():
        own = {
            **module._parameters,
            **{k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set},
        }
        for key, tensor in own.items():
            if tensor is not None and id(tensor) not in inside:
                kept.setdefault(id(tensor), (f"{module_name}.{key}".lstrip("."), tensor))
    return dict(kept.values())


# --- reading ---


class _Builder:
    """Puts a model together from an empty one."""

    def __init__(self, place: Path, structure: dict[str, Any], file: Any, backend: Backend) -> None:
        self.place, self.structure, self.file, self.backend = place, structure, file, backend
        self.names = set(file.keys())

    def build(self) -> nn.Module:
        """The model: modules first, then what stayed floating point."""
        model = self._empty()
        sites: dict[str, Site] = {}
        for entry in self.structure["products"]:
            site = sites.setdefault(entry["site"], self._site(entry["linears"][0], entry["share"], entry["site"]))
            parts = [(self.get(f"{n}.codes"), self.get(f"{n}.step"), self.maybe(f"{n}.bias")) for n in entry["linears"]]
            for name, linear in zip(entry["linears"], merged(self.backend, site, parts, entry["gated"]), strict=True):
                model.set_submodule(name, linear)
        for path, entry in self.structure["experts"].items():
            self._experts(model, path, entry)
        for path, entry in self.structure["norms"].items():
            reader = cast(W8A8Linear, model.get_submodule(entry["read_by"]))
            norm = W8A8Norm(model.get_submodule(path), entry["kind"], entry["eps"], entry["plus_one"], reader.site)
            model.set_submodule(path, norm)
        for path in self.structure["mlps"]:
            module = model.get_submodule(path)
            front = getattr(module, "gate_up_proj", None) or module.gate_proj
            module.__class__ = gated(cast(Hashable, type(module)))
            module.__dict__.update(front=front, back=module.down_proj)
        if self.structure["tied_embedding"]:
            head = cast(W8A8Linear, model.get_output_embeddings())  # type: ignore[operator]
            named = self.structure.get("embedding_dtype")  # folders of before have none
            dtype = cast(torch.dtype, getattr(torch, named) if named else model.config.dtype)
            model.set_input_embeddings(W8A8Embedding(head, dtype))  # type: ignore[operator]
        self._fill(model)
        if self.structure["attention"]:
            int8_attention.use(wrap(model), model, self.backend)
        finish(model)
        return model.eval()

    def get(self, name: str) -> Tensor:
        """A tensor of the file. Raises `SqvizError` naming one that is missing."""
        if name not in self.names:
            raise SqvizError(f"{self.place / TENSORS} lacks {name!r}: the folder is not whole. Write it anew.")
        found = self.file.get_tensor(name)
        return found if name.endswith(".codes") else found.clone()  # one that is kept would hold the whole file mapped

    def maybe(self, name: str) -> Tensor | None:
        """A tensor of the file, or None."""
        return self.get(name) if name in self.names else None

    def _empty(self) -> nn.Module:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        config = AutoConfig.from_pretrained(self.place)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if (self.place / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.place)
        return model

    def _site(self, name: str, share: str, first: str) -> Site:
        step, divisor = self.maybe(f"{name}.input_step"), self.maybe(f"{name}.input_divisor")
        return Site(self.backend, cast(Any, share), step, divisor, (first,))

    def _experts(self, model: nn.Module, path: str, entry: dict[str, Any]) -> None:
        original: Any = model.get_submodule(path)
        made: dict[str, Stack | nn.Parameter] = {}
        for leaf in ("gate_up_proj", "down_proj"):
            name = f"{path}.{leaf}"
            if leaf not in entry:
                made[leaf] = nn.Parameter(self.get(name), requires_grad=False)
                continue
            how, steps = entry[leaf], self.maybe(f"{name}.input_step")
            packed = [
                Product(self.backend, self.backend.pack(codes, step, None, how["gated"]))
                for codes, step in zip(self.get(f"{name}.codes"), self.get(f"{name}.step"), strict=True)
            ]
            each: list[Tensor | None] = [None] if steps is None else list(steps)
            made[leaf] = Stack([Site(self.backend, how["share"], step, None, (name,)) for step in each], packed)
        model.set_submodule(path, W8A8Experts(original, made["gate_up_proj"], made["down_proj"], entry["silu"]))

    def _fill(self, model: nn.Module) -> None:
        """Give every parameter and buffer that is still empty its tensor."""
        for name in self.names:
            parent, _, leaf = name.rpartition(".")
            try:
                module = model.get_submodule(parent)
            except AttributeError:
                continue
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(self.get(name), requires_grad=False)
            elif leaf in module._buffers and not isinstance(module, Fixed):
                module._buffers[leaf] = self.get(name)
        if any(parameter.is_meta for parameter in model.parameters()):
            model.tie_weights()  # type: ignore[operator]
        empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if empty:
            raise SqvizError(f"{self.place / TENSORS} lacks {empty[0]!r} and {len(empty) - 1} more. Write it anew.")


def _tokenizer(place: Path) -> Any:
    from transformers import AutoTokenizer

    if not (place / "tokenizer_config.json").exists():
        return None
    return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
