"""What is measured. n scored and unscored rows, hidden size D, vocabulary V; sequences are of equal length."""

from typing import NamedTuple


class Shape(NamedTuple):
    rows: int
    sequences: int
    hidden: int
    vocabulary: int

    def __str__(self) -> str:
        return f"n{self.rows}-D{self.hidden}-V{self.vocabulary}"

    def flops(self, products: int, scored: float = 1.0) -> float:
        """Of `products` products n x D x V (2 n D V each) on the scored share of the rows."""
        return 2.0 * products * self.rows * scored * self.hidden * self.vocabulary


HEAD = (Shape(512, 16, 128, 2048), Shape(1024, 16, 512, 32000))
RESPONSES = (64, 4096)  # of a constraint step, with 4 constraints

STEP = (
    (16000, 256),
    *((256, 256), (256, 256), (1024, 256), (256, 1024), (256,)) * 9,
    *((256,),) * 9,
    (256, 256),
)  # 10M in 56 tensors
