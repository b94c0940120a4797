"""The scores that a verdict may have, and the scales of our tasks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scale:
    """The scores a verdict may have.

    levels: the allowed values; with `between`, every number from the first to the last as well.
    tag: an XML-like tag that may stand instead of the box (recorded judge texts have `<abg>1</abg>`).
    """

    levels: tuple[float, ...]
    between: bool = False
    tag: str = ""

    def __post_init__(self) -> None:
        if len(self.levels) < 2 or sorted(set(self.levels)) != list(self.levels):
            raise ValueError(f"levels={self.levels}: give two or more, the smallest first")

    @property
    def ends(self) -> tuple[float, float]:
        """The worst and the best score."""
        return self.levels[0], self.levels[-1]

    def holds(self, value: float) -> bool:
        """Whether `value` is a score on this scale; NaN never is."""
        return value in self.levels or (self.between and self.levels[0] <= value <= self.levels[-1])

    def __str__(self) -> str:
        if self.between:
            return f"{self.levels[0]:g} to {self.levels[-1]:g}"
        return ", ".join(f"{level:g}" for level in self.levels)


BINARY = Scale((0.0, 1.0))
AMBIGUITY = Scale((0.0, 1.0), tag="abg")
GRADES = Scale((0.0, 1.0, 2.0, 3.0, 4.0), between=True)
SAFETY = Scale((0.0, 0.5, 1.0))
