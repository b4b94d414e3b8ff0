"""Take subsets of annotations: by image, by class, or by a random split."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.annotations import DetectionAnnotations, FederatedLabels
from lightning_convnext_det.errors import DataError


def take_images(table: DetectionAnnotations, indices: NDArray[np.int64]) -> DetectionAnnotations:
    """Select images, in the order given."""
    counts = np.diff(table.offsets)[indices]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    rows = np.arange(offsets[-1]) + np.repeat(table.offsets[indices] - offsets[:-1], counts)
    return replace(
        _take_objects(table, rows, offsets),
        file_names=table.file_names[indices],
        image_ids=table.image_ids[indices],
        sizes=table.sizes[indices],
        upright=table.upright[indices],
    )


def select_classes(table: DetectionAnnotations, class_names: Sequence[str]) -> DetectionAnnotations:
    """Select the objects of some classes and relabel them in the order given; all images stay.

    Raises:
        DataError: if a class does not exist, or one is named twice.
    """
    for name in class_names:
        if name not in table.class_names:
            raise DataError(f"[LCD-D135] classes: '{name}' is not a class of the data; it has {_listed(table)}")
    if not class_names or len(set(class_names)) < len(class_names):
        raise DataError(f"[LCD-D135] classes: {list(class_names)} must name one or more classes, each once")
    if tuple(class_names) == table.class_names:
        return table
    old_labels = [table.class_names.index(name) for name in class_names]
    new_labels = np.full(len(table.class_names), -1, np.int64)
    new_labels[old_labels] = np.arange(len(class_names))
    labels = new_labels[table.labels]
    kept = np.flatnonzero(labels >= 0)
    counts_before = np.concatenate([[0], np.cumsum(labels >= 0)])
    return replace(
        _take_objects(table, kept, counts_before[table.offsets]),
        labels=labels[kept],
        class_names=tuple(class_names),
        federated=_select_federated(table.federated, old_labels, new_labels),
        category_ids=tuple(table.category_ids[label] for label in old_labels),
    )


def _select_federated(
    federated: FederatedLabels | None, old_labels: Sequence[int], new_labels: NDArray[np.int64]
) -> FederatedLabels | None:
    if federated is None:
        return None
    lists = []
    for one in federated[:2]:
        labels = new_labels[one.labels]
        before = np.concatenate([[0], np.cumsum(labels >= 0)])
        lists.append(one._replace(offsets=before[one.offsets], labels=labels[labels >= 0]))
    chosen = tuple(federated.frequencies[label] for label in old_labels) if federated.frequencies else ()
    return FederatedLabels(lists[0], lists[1], chosen)


def split_randomly(
    table: DetectionAnnotations, fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split images at random: indices to train on and indices held out, both ascending, at least one of each.

    Args:
        table: at least two images.
        fraction: of the images to hold out.
        seed: of the random choice.

    Raises:
        DataError: if there is one image only.
    """
    if len(table) < 2:
        raise DataError(
            f"[LCD-D133] {table.image_root} holds 1 image, too few to hold one out for validation; name validation "
            "images in data.val, or train without validation: data.val_fraction 0"
        )
    count = min(max(round(len(table) * fraction), 1), len(table) - 1)
    order = np.random.default_rng(seed).permutation(len(table))
    return np.sort(order[count:]), np.sort(order[:count])


def count_shared(first: DetectionAnnotations, second: DetectionAnnotations) -> int:
    """Count the image files that two splits have in common."""
    paths = [{str(table.path(index)) for index in range(len(table))} for table in (first, second)]
    return len(paths[0] & paths[1])


def _take_objects(
    table: DetectionAnnotations, rows: NDArray[np.int64], offsets: NDArray[np.int64]
) -> DetectionAnnotations:
    return replace(
        table,
        boxes=table.boxes[rows],
        labels=table.labels[rows],
        crowd=table.crowd[rows],
        area=table.area[rows],
        annotation_ids=table.annotation_ids[rows],
        offsets=offsets,
    )


def _listed(table: DetectionAnnotations) -> str:
    shown = ", ".join(table.class_names[:20])
    return shown + (f" and {len(table.class_names) - 20} more" if len(table.class_names) > 20 else "")
