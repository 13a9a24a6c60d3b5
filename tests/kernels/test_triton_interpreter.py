"""The Triton kernels, interpreted on the CPU, are bit-equal to the definition: see interpreted_checks.py."""

import pytest
from own_process import all_pass, run

pytest.importorskip("triton", reason="the extra 'gpu' is not installed: make setup EXTRAS=dev,gpu")


def test_interpreted_kernels_give_what_the_definition_says():
    all_pass("interpreted_checks.py", least=78, TRITON_INTERPRET="1")


def test_the_interpreter_is_no_backend_and_importing_it_starts_nothing():
    code = """
import sys
from sqviz_kernels.triton_launch import Triton
import torch
assert "triton" not in sys.modules and not torch.cuda.is_initialized()
print(Triton.why_not())
"""
    assert "TRITON_INTERPRET=1 is set" in run("-c", code, TRITON_INTERPRET="1").stdout
    found = run("-c", code)
    assert found.returncode == 0, found.stderr


def test_without_triton_the_backend_says_how_to_get_it():
    code = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
from sqviz_kernels.triton_launch import Triton
print(Triton.why_not())
"""
    assert run("-c", code).stdout.strip() == "triton is not installed: pip install 'sqviz[gpu]'"
