"""How the linear layers of a model are cut, by its size and the number of rows."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.kernels.linear_shapes import Tile


@dataclass(frozen=True, slots=True)
class Tuning:
    """The cut of every linear layer, and whether launches overlap. Changes no result.

    ``wider``: instead of this one for more than 8 rows, and its own ``wider`` for more than 16.
    """

    qkv: Tile
    output: Tile
    gate_up: Tile
    down: Tile
    head: Tile
    overlap: bool = True
    wider: Tuning | None = None

    def at(self, rows: int) -> Tuning:
        """The tuning for so many rows."""
        if rows <= 8 or self.wider is None:
            return self
        if rows <= 16 or self.wider.wider is None:
            return self.wider
        return self.wider.wider


def attention_blocks(sequences: int) -> int:
    """Thread blocks of attention per multiprocessor that measured best on an H100.

    Of few sequences a long one counts most: more blocks than run at once, so that whoever is done
    finds another. Of many, as many as run at once.
    """
    return 8 if sequences <= 8 else 4


def tuning_for(hidden: int) -> Tuning:
    """What measured best on an H200 for models about as wide (docs/results/gpu-step.md)."""
    many = Tuning(Tile(3, 3), Tile(3, 3), Tile(4, 3), Tile(3, 3), Tile(3, 3))
    some = Tuning(Tile(5, 3), Tile(6, 3), Tile(6, 3), Tile(6, 3), Tile(8, 2), wider=many)
    if hidden <= 2048:
        return Tuning(
            Tile(3, 3), Tile(2, 4), Tile(4, 3, 2), Tile(3, 3, 2), Tile(4, 3, 2), wider=some
        )
    if hidden <= 3072:
        return Tuning(Tile(5, 3), Tile(3, 4), Tile(4, 2, 2), Tile(3, 4), Tile(8, 2), wider=some)
    return Tuning(Tile(4, 3), Tile(4, 3), Tile(4, 2, 2), Tile(4, 3), Tile(8, 2), wider=some)
