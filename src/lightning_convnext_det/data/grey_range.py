"""The range of values of 16-bit grey images: given, stored in a checkpoint, or found from the images themselves."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lightning_convnext_det.data.io.pixels import GreyRange, ValueRange
from lightning_convnext_det.data.io.reader import find_value_range

_OPTION = "(data.value_range sets another range)"


class RangeChoice:
    """Chooses the range by which a data module reads: the one given, else the model's, else that of the images.

    Args:
        given: by the user; values outside of it are clipped.
    """

    def __init__(self, given: ValueRange | None) -> None:
        self.current = None if given is None else GreyRange(*given, clip=True)
        """The range in use; None where no image has 16-bit grey, or none has been looked at."""
        self._is_given = self._is_known = given is not None
        self._stored: GreyRange | None = None

    def take(self, stored: tuple[int, int, bool] | None) -> None:
        """Use the range that a model was trained with; where another is given, that one stays, and a line says so."""
        if stored is None or stored in (self._stored, self.current):
            return
        self._stored = stored = GreyRange(*stored)
        trained = [stored.low, stored.high]
        if not self._is_given:
            self.current, self._is_known = stored, True
            rank_zero_info(f"16-bit grey images: {trained} becomes 0 to 255 as in training {_OPTION}")
        elif self.current is not None and [self.current.low, self.current.high] != trained:
            rank_zero_info(f"data.value_range {[self.current.low, self.current.high]} replaces the model's {trained}")

    def find(self, paths: Sequence[Path]) -> None:
        """Look at images where no range is known yet."""
        if not self._is_known and (found := find_value_range(paths)):
            self.current = GreyRange(*found[0], clip=False)
            rank_zero_info(
                f"16-bit grey images with values up to {found[1]}: {list(found[0])} becomes 0 to 255 {_OPTION}"
            )
        self._is_known = True
