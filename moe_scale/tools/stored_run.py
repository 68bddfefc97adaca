"""A finished (or half finished) run, opened for use: its settings, and its model on this process's CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import pydantic
from torch import nn

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.index import Index, read_index
from moe_scale.checkpoint.reader import load_model
from moe_scale.config import LMConfig, RunConfig, SwitchConfig, TranslationConfig
from moe_scale.errors import ConfigError, Problem
from moe_scale.train.pretrained import tokenizer_of

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class StoredRun(Generic[C]):
    """What a run left behind.

    Attributes:
        folder: of the run.
        checkpoint: the one that is used.
        index: its content.
        config: the run's settings.
    """

    folder: Path
    checkpoint: Path
    index: Index
    config: C

    @property
    def tokenizer(self) -> str:
        """Of a text model: what :func:`moe_scale.data.tokenizer.load_tokenizer` takes."""
        return tokenizer_of(str(self.checkpoint))

    def load_model(self, *, dropless: bool = False) -> nn.Module:
        """The model in evaluation mode, in fp32, every byte compared with its checksum; see :func:`load_model`."""
        return load_model(self.checkpoint, dropless=dropless)


class Kind(NamedTuple):
    """A kind of model, the recipe that trains such models, and the settings of its runs."""

    name: str
    recipe: str
    config_class: type


LM = Kind("decoder", "lm_16l", LMConfig)
SWITCH = Kind("switch", "switch", SwitchConfig)
TRANSLATION = Kind("seq2seq", "translation", TranslationConfig)


def open_run(path: str, *kinds: Kind) -> StoredRun[Any]:
    """The newest checkpoint of a run, or the named one.

    Args:
        path: a run's folder, or a checkpoint's in it.
        kinds: of models, one of which it must hold.

    Raises:
        ConfigError: at ``run``, when there is no checkpoint or one of another kind.
    """
    checkpoint = folders.find_checkpoint(Path(path).expanduser())
    index = read_index(checkpoint)
    kind = next((kind for kind in kinds if kind.name == index.kind), None)
    if kind is None:
        what = f"{path} holds a model of kind {index.kind}, not {' or '.join(kind.name for kind in kinds)}"
        recipes = " or ".join(f"recipes/{kind.recipe}.py" for kind in kinds)
        raise ConfigError(Problem("run", what, f"give a run of {recipes}"))
    try:
        config: Any = pydantic.TypeAdapter(kind.config_class).validate_python(index.settings)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ConfigError(Problem("run", f"the settings of {checkpoint} are of another release ({what})")) from None
    return StoredRun(checkpoint.resolve().parents[1], checkpoint, index, config)
