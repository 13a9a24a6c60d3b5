"""What the GPU backends share: is there a device, padding, and how NaN and infinities are noticed without waiting.

`spec` refuses them at once. To raise at once on a GPU, the host would have to wait for the device after every
quantisation, which costs more than a small product. Instead

    the row that holds one gets the step NaN: every number made from it is NaN, never one that looks right
    an int32 on the device is set, which `raise_if_not_finite` reads whenever the caller can afford to wait

With one dynamic step for a whole tensor every row becomes NaN; with a given static step only the rows concerned, and
`Codes.step` then has one entry per row (the given step, or NaN) instead of one.
"""

import torch
from jaxtyping import Float, Int, Int8, Int32
from torch import Tensor
from torch.nn import functional as F

from sqviz.errors import NonFinite
from sqviz_kernels.backend import Backend, Packed

_flags: dict[torch.device, Tensor] = {}
"""One per device, of all backends: a model asks for a backend many times."""


class GpuBackend(Backend):
    """Base of the backends that run on torch's "cuda" device (NVIDIA, or AMD under ROCm)."""

    device = "cuda"

    def flag(self, device: torch.device) -> Int32[Tensor, "1"]:
        """The int32 of this device that is set once something not finite was quantised on it."""
        if device not in _flags:
            _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return _flags[device]

    def raise_if_not_finite(self) -> None:
        """Raise `NonFinite` if anything quantised since the last call was. Waits for the devices used."""
        found = [device for device, flag in _flags.items() if int(flag)]
        for flag in _flags.values():
            flag.zero_()
        if found:
            raise NonFinite(
                f"the input of an INT8 product on {', '.join(map(str, found))} held a NaN or an infinity, which no "
                "step can represent. What was made from it is NaN. A model in float16 that overflows runs in bfloat16."
            )

    def unpack(self, packed: Packed) -> Int8[Tensor, "out channel"]:
        """The codes of a weight again, without padding."""
        return packed.values[: packed.out, : packed.channels].contiguous()

    def rows(self, packed: Packed, which: Int[Tensor, " row"]) -> Int8[Tensor, "row channel"]:
        """The codes of some out channels."""
        return packed.values[which, : packed.channels]

    def plain_codes(self, x: Float[Tensor, "row channel"]) -> tuple[Int8[Tensor, "row channel"], Float[Tensor, " row"]]:
        """Codes per row without padding, and their steps, which are NaN for a row that is not finite."""
        codes = self.quantise(x)
        return codes.values[: codes.rows, : codes.channels], codes.step


def why_no_gpu() -> str | None:
    """None if torch can reach a GPU, else why not, and what would help. Starts nothing on the device."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this torch ({torch.__version__}) was built without CUDA or ROCm; install one that was: "
            "https://pytorch.org/get-started"
        )
    if not torch.cuda.is_available():
        return "torch finds no GPU; `nvidia-smi` (or `rocm-smi`) shows whether the machine and its driver have one"
    return None


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that holds `size`."""
    return -(-size // multiple) * multiple


def padded(t: Tensor, rows: int, channels: int) -> Tensor:
    """A matrix with zeros appended up to [rows, channels], contiguous; itself where nothing is to do."""
    if t.shape == (rows, channels):
        return t.contiguous()
    return F.pad(t, (0, channels - t.shape[1], 0, rows - t.shape[0]))
