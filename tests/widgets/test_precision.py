"""The precision view: what travels to the page is what was measured; stills, labels, traits."""

import json
import math

import pytest
import torch
import traitlets

from sqviz.models.tiny import tiny
from sqviz.quant.precision_map import precision_map
from sqviz.quant.schemes import SMOOTHQUANT_O1
from sqviz.widgets.precision import MEASURES, labels_of, shown
from sqviz.widgets.view import script_json

IDS = (torch.arange(40) * 37 % 128) + 3


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "DeepseekV2ForCausalLM"])
def found(request):
    return precision_map(tiny(request.param), SMOOTHQUANT_O1, text=IDS, length=20, blocks=[1], progress=False)


def test_the_page_gets_every_number(found):
    view = found.view()
    for ops, packed in zip(found.blocks, view.meta["blocks"], strict=True):
        for one, sent in zip(ops, packed, strict=True):
            for key in MEASURES:
                value = view.value(one, key)
                assert sent[key] == (value if math.isfinite(value) else None)
            assert sent["operands"] == [
                [x.label, x.granularity, x.steps, x.largest if math.isfinite(x.largest) else None] for x in one.operands
            ]
    assert json.loads(script_json(view.meta))["together"] == found.together
    assert view.operator == max((o for o in found.blocks[0] if o.quantised), key=lambda o: o.in_block).name


def test_every_label_names_one_operator(found):
    labels = labels_of(found)
    assert set(labels) == {one.name for ops in found.blocks for one in ops}
    assert len(set(labels.values())) == len(labels)


def test_pictures_say_what_they_show(found, tmp_path):
    svg = found.to_svg()
    for one in found.blocks[0]:
        assert shown(one.in_block, one.quantised) in svg
    assert "QKᵀ" in svg
    assert "16 bit" in svg
    assert found.to_png(tmp_path / "map.png").stat().st_size > 10_000
    bundle = found._repr_mimebundle_()
    assert "image/png" in bundle[0]


def test_brackets_are_for_what_is_not_quantised():
    assert (shown(0.0123, True), shown(0.0123, False), shown(math.nan, True)) == ("0.0123", "(0.0123)", "–")


def test_a_block_that_is_not_there(found):
    with pytest.raises(traitlets.TraitError, match="there are blocks 0 … 1"):
        found.view(block=5)
