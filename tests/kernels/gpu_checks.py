"""One backend against the definition, on any device: for the interpreter, the simulator, the library and a real GPU.

Bit-equal: codes of what is only divided, sums, epilogues. Codes that differ by at most one in few places: what passes
through a sum of floats or an exponential (norms, gates, softmax), as `spec` allows.
"""

import torch
from sqviz_kernels import spec
from sqviz_kernels.backend import Backend, Codes
from torch import Tensor

FEW = 2e-3
"""Share of the codes that may be off by one where a float sum or an exponential is involved."""
SHAPES = [(1, 1, 1), (1, 576, 33), (7, 131, 45), (33, 48, 16), (2, 4097, 3), (5, 16, 130)]
"""Rows, channels, out: one row, odd sizes, one more than a block, several tiles."""
EMPTY = [(0, 64, 8), (5, 0, 4), (3, 8, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HOW = ["token", "tensor", "static", "divided", "divided static"]


def values(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", outlier: float = 30.0) -> Tensor:
    """Normal values with a large channel, a row of zeros and one of nearly nothing.

    That one is not subnormal in bfloat16: Triton's interpreter reads those wrongly.
    """
    x = torch.randn(*shape)
    if x.ndim == 2 and shape[0] > 2 and shape[1]:
        x[:, shape[1] // 2] *= outlier
        x[1] = 0
        x[2] *= 1e-30 if dtype == torch.bfloat16 else 1e-38
    return x.to(dtype).to(device)


def codes(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8).to(device)


def options(how: str, channels: int, device: str) -> dict:
    """Arguments of `quantise` for a way of finding the step."""
    found: dict = {"share": "tensor"} if how == "tensor" else {}
    if "static" in how:
        found["step"] = torch.tensor([0.0213], device=device)
    if "divided" in how:
        found["divisor"] = torch.rand(channels, device=device) + 0.3
    return found


def on_cpu(arguments: dict) -> dict:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def unpadded(found: Codes) -> Tensor:
    return found.values[: found.rows, : found.channels].cpu()


def same_step(found: Tensor, expected: Tensor) -> bool:
    """Equal; a backend may repeat the one step for every row."""
    return torch.equal(found.cpu(), expected.expand(found.shape))


def near(found: Codes, expected: tuple[Tensor, Tensor]) -> None:
    """Off by one at most, in few places; steps to seven digits."""
    q, step = expected
    apart = (unpadded(found).int() - q.int()).abs()
    assert not apart.numel() or apart.max() <= 1
    assert (apart > 0).sum() <= max(1, FEW * apart.numel())
    torch.testing.assert_close(found.step.cpu(), step.expand(found.step.shape), rtol=1e-6, atol=0)


def check_quantise(backend: Backend, x: Tensor, how: str) -> None:
    arguments = options(how, x.shape[1], str(x.device))
    found = backend.quantise(x, **arguments)
    q, step = spec.quantise(x.cpu(), **on_cpu(arguments))
    assert (found.rows, found.channels) == tuple(x.shape)
    assert torch.equal(unpadded(found), q)
    assert same_step(found.step, step)


def check_linear(
    backend: Backend, rows: int, channels: int, out: int, device: str, dtype: torch.dtype, how: str, bias: bool
) -> None:
    """A product of quantised values, with a step per out channel (one for all if the step of X is static)."""
    x, w = values(rows, channels, device=device), codes(out, channels, device=device)
    w_step = torch.rand(1 if how == "static" else out, device=device) * 0.01
    b = torch.randn(out, device=device) if bias else None
    arguments = options(how, channels, device)
    packed = backend.pack(w, w_step, b)
    assert torch.equal(backend.unpack(packed), w)
    if out:
        which = torch.tensor([out - 1, 0], device=device)
        assert torch.equal(backend.rows(packed, which), w[which])
    q, step = spec.quantise(x.cpu(), **on_cpu(arguments))
    expected = spec.linear(q, step, w.cpu(), w_step.cpu(), None if b is None else b.cpu(), dtype)
    found = backend.linear(backend.quantise(x, **arguments), packed, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), expected)


def check_extremes(backend: Backend, device: str, channels: int = 4096) -> None:
    """Sums of ±127 · 127: saturating int16 pairs or float32 sums would be seen."""
    x, w = (
        torch.full((18, channels), 127.0, device=device),
        torch.full((9, channels), 127, dtype=torch.int8, device=device),
    )
    x[1::2], w[1::2] = -127.0, -127
    x[3], w[3, ::2] = 126.0, 126
    one = torch.ones(1, device=device)
    found = backend.linear(backend.quantise(x, one), backend.pack(w, one))
    assert torch.equal(found.cpu(), spec.product(x.cpu().to(torch.int8), w.cpu()).float())


def check_strides(backend: Backend, device: str) -> None:
    """Rows apart, rows repeated, channels apart, a transposed weight."""
    wide = values(6, 100, device=device)
    for x in (wide[:, 3:67], wide[::2], wide[:1].expand(5, 100), wide.T, wide[:, ::3], wide[1:1]):
        check_quantise(backend, x, "token")
        check_quantise(backend, x, "divided")
        gain = torch.rand(x.shape[1], device=device)
        found = backend.norm_quantise(x, gain, None, 1e-5, "rms")
        near(found, spec.norm_quantise(x.cpu(), gain.cpu(), None, 1e-5, "rms"))
    w, step = codes(100, 7, device=device).T, torch.rand(7, device=device)
    q, x_step = spec.quantise(wide.cpu())
    found = backend.linear(backend.quantise(wide), backend.pack(w, step))
    assert torch.equal(found.cpu(), spec.linear(q, x_step, w.cpu(), step.cpu()))


def check_norm(backend: Backend, x: Tensor, kind: str, bias: bool, how: str) -> None:
    """Codes, and the normalised values themselves where they are asked for."""
    device, channels = x.device, x.shape[1]
    gain = torch.rand(channels, device=device) + 0.5
    b = torch.randn(channels, device=device) * 0.1 if bias else None
    step = torch.tensor([0.0213], device=device) if how == "static" else None
    share = "tensor" if how == "tensor" else "token"
    out = torch.empty_like(x)
    found = backend.norm_quantise(x, gain, b, 1e-5, kind, step, share, out=out)
    given = (x.cpu(), gain.cpu(), None if b is None else b.cpu(), 1e-5, kind)
    near(found, spec.norm_quantise(*given, None if step is None else step.cpu(), share))
    # a norm of nearly nothing has no digits to compare: bfloat16 rounds what float32 left open
    rounding = (
        {"rtol": torch.finfo(x.dtype).eps, "atol": 1e-6} if x.dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(out.cpu(), spec.norm(*given).to(x.dtype), **rounding)


def check_gated(backend: Backend, rows: int, channels: int, device: str, how: str) -> None:
    x, w = values(rows, channels, device=device), codes(2 * channels, channels, device=device)
    step = torch.tensor([0.0213], device=device) if how == "static" else None
    share = "tensor" if how == "tensor" else "token"
    w_step = torch.rand(2 * channels, device=device) * 1e-3
    found = backend.gated(backend.quantise(x), backend.pack(w, w_step, gated=True), step, share)
    gate, up = spec.linear(*spec.quantise(x.cpu()), w.cpu(), w_step.cpu()).chunk(2, 1)
    near(found, spec.gate_quantise(gate, up, None if step is None else step.cpu(), share))


def attention_inputs(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, device: str
) -> list[Tensor]:
    q = torch.randn(batch, heads, queries, dim, device=device)
    k, v = codes(batch, kv_heads, keys, dim, device=device), codes(batch, kv_heads, keys, dim, device=device)
    k_step, v_step = (torch.rand(batch, kv_heads, keys, device=device) * 0.03 for _ in range(2))
    return [q, k, k_step, v, v_step]


def check_batched(backend: Backend, outer: int, inner: int, rows: int, out: int, channels: int, device: str) -> None:
    """Products of many matrices, with steps of B and without; B as it lies, and transposed."""
    a, b = values(outer * inner * rows, channels, device=device), codes(outer, inner, out, channels, device=device)
    b_step = torch.rand(outer, inner, out, device=device)
    q, step = spec.quantise(a.cpu())
    q, step = q.view(outer, inner, rows, channels), step.view(outer, inner, rows)
    for each in (b, b.transpose(2, 3).contiguous().transpose(2, 3)):
        for own in (b_step, None):
            found = backend.batched(backend.quantise(a), each, own, 0.37).cpu()
            expected = spec.batched(q, step, each.cpu(), None if own is None else own.cpu(), 0.37)
            assert torch.equal(found, expected)


def check_attention(
    backend: Backend, given: list[Tensor], causal_from: int | None = None, mask: Tensor | None = None
) -> None:
    """To four digits: a code of P that is off by one moves a row by one part in some hundreds of its largest weight."""
    scaling = given[0].shape[-1] ** -0.5
    found = backend.attention(*given, scaling, causal_from, mask).cpu()
    mask = None if mask is None else mask.cpu()
    expected = spec.attention(*(t.cpu() for t in given), scaling, causal_from, mask)
    assert found.dtype == expected.dtype
    apart = (found.float() - expected.float()).abs()
    step = 127 * given[4].max().item() / 127  # one code of P, times the largest value
    assert apart.max() <= 1.1 * step + torch.finfo(found.dtype).eps * expected.abs().max()
    assert apart.mean() <= FEW * step + torch.finfo(found.dtype).eps * expected.abs().max()


def check_not_finite(backend: Backend, device: str) -> None:
    """A row with a NaN or an infinity becomes NaN, the others stay what they are; the flag says so once."""
    x = values(6, 40, device=device)
    clean = x.clone()
    x[1, 7], x[3, 0], x[4, 39] = float("nan"), float("inf"), float("-inf")
    bad, good = [1, 3, 4], [0, 2, 5]
    packed = backend.pack(codes(9, 40, device=device), torch.rand(9, device=device), torch.rand(9, device=device))
    for how in ("token", "static", "divided"):
        arguments = options(how, 40, device)
        y, expected = (backend.linear(backend.quantise(t, **arguments), packed).cpu() for t in (x, clean))
        assert y[bad].isnan().all()
        assert torch.equal(y[good], expected[good])
    assert backend.linear(backend.quantise(x, share="tensor"), packed).isnan().all()
    plain, steps = backend.plain_codes(x)
    assert plain.shape == x.shape
    assert steps[bad].isnan().all()
    assert steps[good].isfinite().all()
