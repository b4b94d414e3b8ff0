"""Check of the data module's arguments that exclude each other."""

from collections.abc import Mapping, Sequence

from lightning_convnext_det.arguments import check_class_names
from lightning_convnext_det.data.splits import Stage
from lightning_convnext_det.errors import ArgumentError


def check_choices(
    root: str | None,
    datasets: Mapping[Stage, object] | None,
    predict: str | list[str] | None,
    predict_split: Stage | None,
    repeat_threshold: float | None,
    class_names: Sequence[str] | None,
    value_range: tuple[int, int] | None,
) -> None:
    """Refuse arguments that exclude each other."""
    if root is not None and datasets is not None:
        raise ArgumentError("root and datasets are both given; give a folder, or datasets of your own")
    if datasets is not None and repeat_threshold:
        raise ArgumentError("repeat_threshold counts the classes of a folder's annotations; give root, not datasets")
    if predict is not None and predict_split is not None:
        raise ArgumentError("predict and predict_split are both given; give images, or a split of the dataset")
    check_class_names(class_names or ())
    if value_range is not None and value_range[0] >= value_range[1]:
        raise ArgumentError(f"value_range is {list(value_range)}; give the lower value first")
