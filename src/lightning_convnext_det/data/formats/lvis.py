"""What LVIS adds to COCO's JSON: classes verified to be absent from an image or not exhaustively annotated in it.

Images hold ``neg_category_ids`` and ``not_exhaustive_category_ids``, categories ``frequency``: r, c or f. A file with
``neg_category_ids`` is evaluated as lvis-api does.

Reference:
    Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", arXiv:1908.03195, section 2.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_convnext_det.arguments import Frequency
from lightning_convnext_det.data.annotations import FederatedLabels, LabelLists
from lightning_convnext_det.data.formats.coco_classes import Classes
from lightning_convnext_det.data.formats.coco_values import MalformedError, Record

_FREQUENCIES: dict[object, Frequency] = {"r": "rare", "c": "common", "f": "frequent"}
_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")

CategoryLists = tuple[list[int] | None, list[int] | None]
"""Category ids of an image: those verified to be absent, those not exhaustively annotated; None where not given."""


def category_lists(record: Record) -> CategoryLists:
    """The lists of an image's record.

    Raises:
        MalformedError: if one is not a list of integers.
    """
    negative, not_exhaustive = (_integers(record, key) for key in _KEYS)
    return negative, not_exhaustive


def federated_labels(
    lists: Mapping[int, CategoryLists], image_ids: np.ndarray, classes: Classes, categories: Sequence[object]
) -> FederatedLabels | None:
    """The lists as labels by image id, and the frequencies of the classes; None if no image has negative classes.

    Args:
        lists: by position of the image.
        image_ids: of all images.
        classes: of the file; ids of other categories are left out.
        categories: members of the list.
    """
    if not any(negative is not None for negative, _ in lists.values()):
        return None
    labels: list[dict[int, list[int]]] = [{}, {}]
    for index, pair in lists.items():
        for found, ids in zip(labels, pair, strict=True):
            if ids is not None:
                found[int(image_ids[index])] = [classes.label_of[key] for key in ids if key in classes.label_of]
    return FederatedLabels(LabelLists.of(labels[0]), LabelLists.of(labels[1]), _frequencies(classes, categories))


def _frequencies(classes: Classes, categories: Sequence[object]) -> tuple[Frequency, ...]:
    """Of the classes in order of label; empty unless each is given."""
    known = {one.get("name"): _FREQUENCIES.get(one.get("frequency")) for one in categories if isinstance(one, dict)}
    found = [known.get(name) for name in classes.names]
    return tuple(one for one in found if one is not None) if None not in found else ()


def _integers(record: Record, key: str) -> list[int] | None:
    value = record.get(key)
    if value is not None and not (isinstance(value, list) and all(type(one) is int for one in value)):
        raise MalformedError(f".{key}: expected a list of category ids, found {str(value)[:80]}")
    return value
