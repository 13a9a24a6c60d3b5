"""Text columns of data sets on the hub (or in a local folder that `datasets` can read), streamed row by row."""

from collections.abc import Callable, Iterator
from typing import Any

from sqviz.errors import DownloadError, SqvizError

FORM = "hub:dataset/config/split/column"
EXAMPLE = "hub:Salesforce/wikitext/wikitext-2-raw-v1/test/text"


def parse_hub(source: str) -> tuple[str, str | None, str, str]:
    """-> (dataset, config or None for "default", split, column).

    The last three parts are config, split and column; what stands before them is the data set, slashes and all.
    """
    parts = source.removeprefix("hub:").split("/")
    dataset = "/".join(parts[:-3])
    if len(parts) < 4 or not dataset or not all(parts[-3:]):
        raise SqvizError(
            f"{source!r} does not have the form {FORM!r}. Example: {EXAMPLE!r}; a data set without configurations has "
            "the config 'default'"
        )
    config, split, column = parts[-3:]
    return dataset, None if config == "default" else config, split, column


def open_hub(source: str) -> Callable[[], Iterator[str]]:
    """A function that starts a new pass over the column. The form is checked now, the hub is asked at each pass."""
    dataset, config, split, column = parse_hub(source)

    def documents() -> Iterator[str]:
        for row in _rows(source, dataset, config, split):
            value = row.get(column)
            if not isinstance(value, str):
                raise SqvizError(
                    f"{source!r}: the column {column!r} holds no text; the columns are: "
                    f"{', '.join(f'{name} ({type(cell).__name__})' for name, cell in row.items())}"
                )
            yield value

    return documents


def _rows(source: str, dataset: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield from load_dataset(dataset, config, split=split, streaming=True)
    except ValueError as error:  # no such config or split: the message of `datasets` lists those there are
        raise SqvizError(f"{source!r}: {error}. The form is {FORM!r}") from error
    except (OSError, HfHubHTTPError) as error:
        raise DownloadError(
            f"{source!r} cannot be read: {str(error)[:300]}. Check the name and the network; sqviz.text() has embedded "
            "text, and sqviz.text(path) reads .txt, .md and .jsonl files"
        ) from error
