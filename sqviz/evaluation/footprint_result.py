"""`Footprint` and `Footprints`: what a model takes per device, as tables and as stacked bars."""

import dataclasses
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqviz.quant.schemes import Scheme
from sqviz.shown import Shown

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from sqviz.widgets.still import Still

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Footprints(Shown):
    """Several footprints beside each other: of schemes, of models, of numbers of devices.

    Attributes:
        rows: the footprints.
    """

    rows: tuple["Footprint", ...]

    def to_frame(self) -> "pandas.DataFrame":
        """One row per footprint, in GB (10⁹ bytes) and GiB (2³⁰ bytes)."""
        import pandas

        return pandas.DataFrame(
            [
                {
                    "devices": row.devices,
                    "weights, GB": row.weights / GB,
                    "keys and values, GB": row.cache / GB,
                    "activations, GB": row.activations / GB,
                    "per device, GB": row.per_device / GB,
                    "per device, GiB": row.per_device / GIB,
                    "in total, GB": row.total / GB,
                    "in total, GiB": row.total / GIB,
                }
                for row in self.rows
            ],
            index=self.labels,
        )

    @property
    def labels(self) -> list[str]:
        """A name for each row: what not all of them have in common."""
        shared = self._shared
        labels = [" · ".join(word for word in row.words if word not in shared) or row.words[1] for row in self.rows]
        return [f"{label} ({labels[:at].count(label) + 1})" if label in labels[:at] else label
                for at, label in enumerate(labels)]  # fmt: skip

    @property
    def stacks(self) -> dict[str, dict[str, float]]:
        """What `figure` shows: GiB per device, by row and part."""
        return {label: row.parts(GIB) for label, row in zip(self.labels, self.rows, strict=True)}

    def figure(self, gib: float | None = None) -> "plotly.graph_objects.Figure":
        """A bar per row, of weights, keys and values, and activations. `gib`: also a line at a device's memory."""
        from sqviz.plots.footprint import stacked

        return stacked(self.stacks, self._title, "GiB per device", limit=gib)

    def still(self, gib: float | None = None) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        from sqviz.widgets.footprint_still import stacked_still

        return stacked_still(self.stacks, self._title, "GiB per device", limit=gib)

    def __repr__(self) -> str:
        return "\n".join([self._title, self.to_frame().to_string(float_format=_number), *self._notes])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/html": _html(self._title, self.to_frame(), self._notes), "text/plain": repr(self)}

    @property
    def _shared(self) -> list[str]:
        return [word for word in self.rows[0].words if all(word in row.words for row in self.rows)]

    @property
    def _title(self) -> str:
        return " · ".join(["Memory per device", *self._shared])

    @property
    def _notes(self) -> list[str]:
        return list(dict.fromkeys(note for row in self.rows for note in row.notes))


@dataclasses.dataclass(frozen=True)
class Footprint(Shown):
    """What one model takes under one scheme. All sizes in bytes on one device, the fullest.

    Attributes:
        name: of the model.
        scheme: how its linears are quantised; None: not at all.
        batch, length: sequences, and tokens in each: read, and then held in the cache.
        devices: over how many it is split by tensor parallelism.
        dtype: of what is not quantised.
        kv_bits: of cached keys and values.
        parameters: how many there are, tied ones once; of the model and not of a device.
        linears: weights of the blocks' linears.
        steps: their steps.
        embeddings: the embedding of tokens and lm_head.
        rest: norms, biases, positions, routers.
        cache: keys and values.
        activations: the most that a forward pass takes, estimated.
        notes: what to know about this one, in words.
    """

    name: str
    scheme: Scheme | None
    batch: int
    length: int
    devices: int
    dtype: str
    kv_bits: int
    parameters: int
    linears: int
    steps: int
    embeddings: int
    rest: int
    cache: int
    activations: int
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Bytes of all parameters on one device."""
        return self.linears + self.steps + self.embeddings + self.rest

    @property
    def per_device(self) -> int:
        """Bytes of everything on one device."""
        return self.weights + self.cache + self.activations

    @property
    def total(self) -> int:
        """Bytes of all devices together, each counted as the fullest."""
        return self.devices * self.per_device

    def fits(self, gib: float) -> bool:
        """Whether everything fits into a device with this many GiB (2³⁰ bytes) to spare; a GPU of "80 GB" has 80."""
        return self.per_device <= gib * GIB

    def parts(self, unit: int = 1) -> dict[str, float]:
        """What `figure` stacks, on one device, in a unit such as 2**30 bytes."""
        return {
            "weights": self.weights / unit,
            "keys and values": self.cache / unit,
            "activations": self.activations / unit,
        }

    @property
    def words(self) -> tuple[str, ...]:
        """What tells it from others, in words: model, scheme, tokens, devices, and a cache of other bits."""
        scheme = self.dtype if self.scheme is None else self.scheme.name or self.scheme.describe()
        devices = f"{self.devices} device{'s' * (self.devices > 1)}"
        return (self.name, scheme, f"{self.batch} × {self.length} tokens", devices, f"KV {self.kv_bits} bit")

    def to_frame(self) -> "pandas.DataFrame":
        """One row per part and one for the sum; per device and in total, in GB (10⁹ bytes) and GiB (2³⁰ bytes)."""
        import pandas

        parts = {
            "weights of linears": self.linears,
            "steps of linears": self.steps,
            "embeddings and head": self.embeddings,
            "norms, biases and the rest": self.rest,
            "keys and values": self.cache,
            "activations (estimate)": self.activations,
            "together": self.per_device,
        }
        columns = {
            "per device, GB": [size / GB for size in parts.values()],
            "per device, GiB": [size / GIB for size in parts.values()],
            "in total, GB": [self.devices * size / GB for size in parts.values()],
            "in total, GiB": [self.devices * size / GIB for size in parts.values()],
        }
        return pandas.DataFrame(columns, index=list(parts))

    def figure(self, gib: float | None = None) -> "plotly.graph_objects.Figure":
        """One bar, of weights, keys and values, and activations. `gib`: also a line at a device's memory."""
        return Footprints((self,)).figure(gib)

    def still(self, gib: float | None = None) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        return Footprints((self,)).still(gib)

    def __repr__(self) -> str:
        return "\n".join([self._title, self.to_frame().to_string(float_format=_number), *self.notes])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/html": _html(self._title, self.to_frame(), self.notes), "text/plain": repr(self)}

    @property
    def _title(self) -> str:
        return " · ".join(["Memory", *self.words, f"{self.parameters / 1e9:.4g} billion parameters"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _html(title: str, frame: "pandas.DataFrame", notes: Sequence[str]) -> str:
    lines = [f"<p>{html.escape(line)}</p>" for line in notes]
    return f"<p><b>{html.escape(title)}</b></p>{frame.to_html(float_format=_number, border=0)}{''.join(lines)}"
