"""Class names of a COCO file from its ``categories``."""

from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.formats.coco_values import MalformedError, identifier
from lightning_convnext_det.data.formats.problems import AnnotationProblems
from lightning_convnext_det.data.io.listing import is_utf8


class Classes(NamedTuple):
    """The classes of a file."""

    names: tuple[str, ...]
    """In order of label."""
    ids: tuple[int, ...]
    """Category ids in order of label; negative for classes that the file does not declare."""
    label_of: dict[int | str, int]
    """Label by category id."""
    name_of: dict[int, str]
    """Declared name by category id."""


class _Category(NamedTuple):
    id: int
    name: str
    supercategory: object


def read_classes(
    categories: list[object],
    used: Set[int | str],
    class_names: Sequence[str] | None,
    path: Path,
    file: str,
    problems: AnnotationProblems,
) -> Classes:
    """Names and ids in order of label.

    Args:
        categories: members of the list.
        used: category ids that annotations have.
        class_names: names in order of label (default: by category id).
        path: of the file.
        file: what messages call it.
        problems: for notes.

    Raises:
        UnreadableError: a DataError, if the list is empty or malformed, or an id or a name is used twice.
    """
    if not categories:
        raise UnreadableError.of("LCD-D008", path, "'categories' is empty; a detector needs at least one class")
    parsed = [_category(one, f"categories[{number}]", path) for number, one in enumerate(categories)]
    id_of: dict[str, int] = {}
    name_of: dict[int, str] = {}
    for number, one in enumerate(parsed):
        if one.id in name_of or one.name in id_of:
            if root := _root_category([other for other in parsed if one.name == other.name], parsed, used):
                reason = (
                    f"category {root.id} {root.name!r} is a root without boxes, and gives way to the class of its name"
                )
                problems.note("LCD-D152", (file, ""), reason)
                name_of.pop(root.id, None)
                if one is root:
                    continue
            elif one.id in name_of or problems.invalid_annotations != "drop":
                reason = f"id {one.id} or name {one.name!r} is used twice"
                if one.id not in name_of:
                    reason += (
                        f" (ids {id_of[one.name]} and {one.id}); rename one, or invalid_annotations: drop joins them"
                    )
                raise UnreadableError.of("LCD-D008", path, reason, f"categories[{number}]")
            else:
                problems.note("LCD-D152", (file, ""), f"categories of the same name {one.name!r} are joined")
                name_of[one.id] = one.name
                continue
        id_of[one.name] = one.id
        name_of[one.id] = one.name
    if class_names is None:
        names = tuple(name for _, name in sorted((category_id, name) for name, category_id in id_of.items()))
    else:
        names = tuple(class_names)
        extra = [name for name, category_id in id_of.items() if category_id in used and name not in names]
        _note_undeclared(names, id_of, extra, path, file, problems)
    ids = tuple(id_of.get(name, -1 - label) for label, name in enumerate(names))
    label_of = {name: label for label, name in enumerate(names)}
    return Classes(names, ids, {key: label_of[name] for key, name in name_of.items() if name in label_of}, name_of)


def _category(member: object, place: str, path: Path) -> _Category:
    try:
        category_id = identifier(member, "id") if isinstance(member, dict) else None
    except MalformedError as error:
        raise UnreadableError.of("LCD-D008", path, str(error).lstrip("."), place) from error
    name = member.get("name") if isinstance(member, dict) else None
    if type(name) is int:
        name = str(name)
    if not isinstance(category_id, int) or not isinstance(name, str) or not name.strip() or not is_utf8(name):
        raise UnreadableError.of("LCD-D008", path, "expected an object with an id and a name", place)
    assert isinstance(member, dict)
    return _Category(category_id, name, member.get("supercategory"))


def _root_category(same: Sequence[_Category], parsed: Sequence[_Category], used: Set[int | str]) -> _Category | None:
    """Of two categories of one name, the one that only groups others, as Roboflow writes it; None if there is none."""
    groups = {one.supercategory for one in parsed}
    for one in same:
        if one.id not in used and sum(other.id == one.id for other in parsed) == 1 and len(same) == 2:
            other = same[1] if one is same[0] else same[0]
            if one.supercategory == "none" or (one.name in groups and other.supercategory == one.name):
                return one
    return None


def _note_undeclared(
    names: Sequence[str],
    id_of: dict[str, int],
    extra: Sequence[str],
    path: Path,
    file: str,
    problems: AnnotationProblems,
) -> None:
    """Note class names that the file does not declare; refuse if it has objects of others instead, or declares none."""
    unknown = [name for name in names if name not in id_of]
    if not unknown:
        return
    reason = f"class {unknown[0]!r} is not among the categories {tuple(id_of)}"
    if extra or len(unknown) == len(names):
        raise UnreadableError.of("LCD-D120", path, reason)
    more = f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else ""
    problems.note("LCD-D120", (file, ""), f"{reason}{more}; the file has no objects of them")
