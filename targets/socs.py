"""The table of chips: `targets/data/socs.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from bluelm.errors import InputError

TABLE = Path(__file__).parent / "data" / "socs.yaml"
DEFAULT_SNAPDRAGON = "SM8650"


class Soc(BaseModel):
    """One chip.

    Attributes:
        qnn_soc_model, hexagon_arch: Qualcomm's own numbers; None for others.
        dram_gb_s: peak bandwidth of its memory; None if nobody says.
        context_binary_mib: most that one compiled NPU binary may hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    vendor: str
    aliases: tuple[str, ...] = ()
    qnn_soc_model: int | None = None
    hexagon_arch: int | None = None
    dram_gb_s: float | None = None
    context_binary_mib: int | None = None

    def answers_to(self, name: str) -> bool:
        """Whether `name` is its id or an alias, in any case."""
        return name.lower() in {word.lower() for word in (self.id, *self.aliases)}


class TargetRow(BaseModel):
    """A name that `--target` takes: its default chip and runtime. What else it offers, formats' records say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vendor: str
    soc: str
    runtime: str


class ChipTable(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: dict[str, TargetRow]
    socs: tuple[Soc, ...]


@cache
def table() -> ChipTable:
    """The whole table."""
    return ChipTable.model_validate(yaml.safe_load(TABLE.read_text(encoding="utf-8")))


def find_soc(name: str, vendor: str | None = None) -> Soc:
    """A chip by id or alias, of one vendor if that is given.

    Raises:
        InputError: unknown; the known ones are listed.
    """
    socs = [soc for soc in table().socs if vendor in (None, soc.vendor)]
    for soc in socs:
        if soc.answers_to(name):
            return soc
    known = ", ".join(soc.id.lower() for soc in socs)
    raise InputError(f"unknown chip {name!r}", fix=f"known chips: {known}")
