"""What transformers, the hub and safetensors give up with, said again with the model's name and what to do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sqviz.errors import DownloadError, SqvizError, UnknownArchitecture
from sqviz.models.arch import ARCHS


def not_unpickled(place: Path | str) -> SqvizError:
    """The error for a model that has only pickled weights."""
    return SqvizError(
        f"{str(place)!r} has no .safetensors file. Pickled weights (.bin, .pt) are never read here, because unpickling "
        "runs whatever code is in them. If you trust the file, convert it once: "
        "transformers.AutoModelForCausalLM.from_pretrained(PLACE).save_pretrained(FOLDER), then sqviz.load(FOLDER)"
    )


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Say which model it was and what to do, where transformers, the hub or safetensors give up."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise SqvizError(
            f"a weight file of {name!r} is truncated or altered ({error}). Fetch or copy it again"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, SqvizError | DownloadError):
            raise
        causes = list(_chain(error))
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            fix = "it is gated: accept its terms on its hub page, then run `hf auth login`"
        elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            fix = "the hub has no such model, or it is private: check the spelling, or run `hf auth login`"
        elif "trust_remote_code" in str(error):
            raise UnknownArchitecture(
                f"{name!r} needs code that comes with the model, which sqviz never runs (trust_remote_code is False); "
                f"known architectures: {', '.join(sorted(ARCHS))}"
            ) from error
        elif "safetensors" in str(error):
            raise not_unpickled(name) from error
        elif isinstance(error, OSError):
            fix = (
                "the hub cannot be reached, or has not what is needed. Give a local folder, set HF_HUB_OFFLINE=1 if "
                "the model is in the hub's cache already, or call sqviz.load() for the embedded model"
            )
        else:
            raise SqvizError(f"cannot load {name!r}: {error}") from error
        raise DownloadError(f"cannot load {name!r}: {fix}. transformers said: {str(error)[:300]}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
