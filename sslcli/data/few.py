"""Few labels of many: some of a source's images, chosen by a seed or by a list of names."""

from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np

from sslcli import seeds
from sslcli.data.part import Part
from sslcli.data.source import Source
from sslcli.errors import DataError


def share_of_each_class(source: Source, fraction: float, seed: int) -> Part:
    """The same share of every class, at least one image of each; which ones is a function of the seed.

    Raises:
        DataError: the source has no labels.
    """
    if source.labels is None:
        raise DataError("these images have no labels", hint="sort them into one folder per class")
    kept = []
    for label in np.unique(source.labels).tolist():
        rows = np.flatnonzero(source.labels == label)
        order = seeds.permutation(len(rows), seeds.seed_of(seed, "share", label))
        kept.append(rows[order[: max(1, round(fraction * len(rows)))]])
    return Part(source, np.sort(np.concatenate(kept)).astype(np.int64))


def named_in(source: Source, path: Path) -> Part:
    """The images that a text file names, one a line; the class folder, and a label after the name, may be left out.

    Raises:
        DataError: the file cannot be read, or a line names no image, or several.
    """
    try:
        lines = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list `{path}`: {error}") from error
    if not lines:
        raise DataError(f"the list `{path}` names no image")
    by_name: dict[str, list[int]] = defaultdict(list)
    for index in range(len(source)):
        by_name[PurePosixPath(source.name(index)).name].append(index)
    rows: list[int] = []
    for number, line in enumerate(lines, 1):
        wanted = PurePosixPath(line)
        alike = found = by_name.get(wanted.name, [])
        if len(found) > 1:
            found = [index for index in found if PurePosixPath(source.name(index)).parts[-2:] == wanted.parts[-2:]]
        if len(found) != 1:
            what = "is not among the training images" if not alike else "stands for several training images"
            raise DataError(
                f"{path}:{number}: `{line}` {what}",
                hint="give the images that the list was made for, or write names with their class folder",
            )
        rows += found
    if len(set(rows)) < len(rows):
        raise DataError(f"the list `{path}` names an image twice")
    return Part(source, np.array(sorted(rows), dtype=np.int64))
