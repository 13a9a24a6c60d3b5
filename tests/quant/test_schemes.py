import dataclasses

import pytest

import sqviz
from sqviz.errors import SqvizError
from sqviz.quant import schemes
from sqviz.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from sqviz.quant.schemes import PRESETS, Scheme


def test_presets_are_the_rows_of_table_3_2():
    table = {  # weight, activation, static
        "W8A8": (PerTensor(), PerTensor(), False),
        "ZEROQUANT": (PerGroup(64), PerToken(), False),
        "LLM_INT8": (PerChannel(), PerToken(), False),
        "OUTLIER_SUPPRESSION": (PerTensor(), PerTensor(), True),
        "SMOOTHQUANT_O1": (PerTensor(), PerToken(), False),
        "SMOOTHQUANT_O2": (PerTensor(), PerTensor(), False),
        "SMOOTHQUANT_O3": (PerTensor(), PerTensor(), True),
        "SMOOTHQUANT_LLAMA": (PerChannel(), PerToken(), False),
    }
    assert table.keys() == PRESETS.keys()
    for constant, (weight, activation, static) in table.items():
        preset = getattr(schemes, constant)
        assert preset is PRESETS[constant]
        assert (preset.weight, preset.activation, preset.static) == (weight, activation, static)
        assert (preset.bits, preset.bits_of_weights, preset.symmetric) == (8, 8, True)


@pytest.mark.parametrize(
    "scheme",
    [
        *PRESETS.values(),
        Scheme(),
        Scheme(PerTensor(), PerTensor(), name="mine"),
        Scheme(PerGroup(64), PerChannel(), static=True, bits=4, weight_bits=3, symmetric=False),
        Scheme(weight=None),
        Scheme(activation=None, bits=4),
        Scheme(PerTensor(), PerToken(), name="PerTensor() or weight=PerToken("),
    ],
)
def test_as_code_makes_the_scheme_again(scheme):
    again = eval(scheme.as_code(), {"sqviz": sqviz})
    assert again == scheme
    assert again.name == scheme.name
    assert eval(repr(scheme), vars(schemes)) == scheme


def test_as_code_reads_well():
    assert schemes.SMOOTHQUANT_O3.as_code() == "sqviz.SMOOTHQUANT_O3"
    assert Scheme(static=True, activation=PerTensor()).as_code() == (
        "sqviz.Scheme(weight=sqviz.PerChannel(), activation=sqviz.PerTensor(), static=True)"
    )


def test_a_scheme_is_a_value():
    assert Scheme() == Scheme() == schemes.SMOOTHQUANT_LLAMA
    assert hash(Scheme()) == hash(schemes.SMOOTHQUANT_LLAMA)
    assert schemes.W8A8 == schemes.SMOOTHQUANT_O2 != schemes.SMOOTHQUANT_O3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scheme().bits = 4
    changed = schemes.SMOOTHQUANT_O3.replace(static=False)
    assert changed == schemes.SMOOTHQUANT_O2
    assert changed.name == ""


def test_describe():
    assert schemes.SMOOTHQUANT_O3.describe() == "SmoothQuant-O3: W8 per-tensor, A8 per-tensor, static"
    assert Scheme(PerGroup(32), None, bits=8, weight_bits=4).describe() == "W4 per-group(32)"
    assert Scheme(None, PerChannel(), symmetric=False).describe() == "A8 per-channel, dynamic, asymmetric"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": PerToken()}, r"weight=PerToken\(\).*PerTensor\(\), PerChannel\(\), PerGroup\(size\) or None"),
        ({"weight": "per-tensor"}, r"weight='per-tensor'.*PerTensor\(\)"),
        ({"activation": 8}, r"activation=8.*PerToken\(\)"),
        ({"activation": PerToken}, "with brackets"),
        ({"weight": None, "activation": None}, "quantises nothing"),
        ({"static": True}, r"activation=PerToken\(\), static=True.*PerTensor\(\), PerChannel\(\); or use static=False"),
        ({"static": True, "activation": PerGroup(8)}, "static=False"),
        ({"static": True, "activation": None}, "static=False"),
        ({"static": 1}, r"static=1.*True or False"),
        ({"symmetric": "no"}, r"symmetric='no'.*True or False"),
        ({"bits": 16}, r"bits=16.*from 2 to 8"),
        ({"weight_bits": 1}, r"weight_bits=1.*from 2 to 8"),
        ({"name": 3}, r"name=3.*string"),
    ],
)
def test_every_bad_field_is_named(fields, message):
    with pytest.raises(SqvizError, match=message):
        Scheme(**fields)
