"""From words to images: opening a source, finding its other split, and guessing what a path holds.

Only what a source needs is imported for it, so that a wrong path is answered at once.
"""

import os
from pathlib import Path

from sslcli.config.data import AnySource, Cifar, ColouredDigits, Digits, FileList, Folder, Npz, Packed, Voc
from sslcli.data.source import Source
from sslcli.errors import DataError

TEST_PICTURES = 1500
"""How many coloured test digits go with at least as many training ones."""

MANIFEST = "pack.json"
"""The file by which a folder of packed images is known."""

OTHER_FOLDERS = ("val", "test")
OTHER_PARTS: dict[str | None, str] = {"gallery": "query", "train": "test"}
"""In a list with a column `part`, the rows to be judged that go with others."""
SPLIT_FOLDERS = frozenset({"val", "valid", "validation", "dev", "test", "eval"})


def open_source(cfg: AnySource) -> Source:
    """The images that the settings describe; raises DataError if there are none."""
    match cfg:
        case Folder(skip=Path() as names) | FileList(skip=Path() as names) | Packed(skip=Path() as names):
            from sslcli.data.part import without

            return without(_opened(cfg), names)
        case _:
            return _opened(cfg)


def _opened(cfg: AnySource) -> Source:
    match cfg:
        case Folder():
            from sslcli.data.folder import open_folder

            return open_folder(cfg.path, cfg.labels, cfg.on_error)
        case FileList():
            from sslcli.data.file_list import open_list

            return open_list(cfg.path, cfg.root, cfg.on_error, cfg.part)
        case Packed():
            from sslcli.data.packed import open_pack

            return open_pack(cfg.path, cfg.cache, cfg.on_error)
        case Npz():
            from sslcli.data.npz import open_npz

            return open_npz(cfg.path, cfg.images, cfg.labels)
        case Cifar():
            from sslcli.data.cifar import open_cifar

            return open_cifar(cfg.root, cfg.classes, cfg.split, cfg.download)
        case Voc():
            from sslcli.data.voc import open_voc

            return open_voc(cfg.path, cfg.split, cfg.on_error)
        case Digits():
            from sslcli.data.digits import digits

            return digits(cfg.split)
        case ColouredDigits():
            from sslcli.data.digits import coloured_digits

            return coloured_digits(cfg.split, cfg.count, cfg.size, cfg.seed)


def other_split(cfg: AnySource) -> AnySource | None:
    """The test images that belong to training images, where that is known; None for test images and all others."""
    match cfg:
        case Cifar(split="train") | Digits(split="train"):
            return cfg.model_copy(update={"split": "test"})
        case ColouredDigits(split="train"):
            count = TEST_PICTURES if cfg.count >= TEST_PICTURES else max(1, cfg.count // 4)
            return cfg.model_copy(update={"split": "test", "count": count})
        case Voc(split="trainval"):
            return cfg.model_copy(update={"split": "test"})
        case Voc(split="train"):
            return cfg.model_copy(update={"split": "val"})
        case FileList() if cfg.part in OTHER_PARTS:
            return cfg.model_copy(update={"part": OTHER_PARTS[cfg.part]})
        case Folder() if cfg.path.name == "train":
            siblings = [cfg.path.with_name(name) for name in OTHER_FOLDERS]
            found = next((path for path in siblings if os.path.isdir(path.expanduser())), None)
            return None if found is None else cfg.model_copy(update={"path": found, "skip": None})
        case Packed() if "://" not in cfg.path and Path(cfg.path).name == "train":
            packs = [Path(cfg.path).with_name(name) for name in OTHER_FOLDERS]
            pack = next((path for path in packs if os.path.isfile(path.expanduser() / MANIFEST)), None)
            return None if pack is None else cfg.model_copy(update={"path": str(pack), "skip": None})
        case _:
            return None


def guess_source(path: Path) -> AnySource:
    """Settings for the images that a path seems to hold: a folder, its `train`, CIFAR's own files, a list or arrays."""
    path = path.expanduser().absolute()  # a run may be resumed from elsewhere
    if os.path.isdir(path):
        return _guess_folder(path)
    if not os.path.exists(path):
        raise DataError(f"`{path}` does not exist", hint="give a folder, a list of files, an `.npz` archive or a pack")
    match path.suffix.lower():
        case ".csv":
            from sslcli.data.file_list import parts_of

            there = parts_of(path)
            return FileList(path=path, part=next((part for part in OTHER_PARTS if part in there), None))
        case ".txt":
            return FileList(path=path)
        case ".npz":
            return Npz(path=path)
        case ".tar" | ".tgz" | ".gz" | ".zip" | ".xz" | ".bz2":
            raise DataError(f"`{path}` is an archive", hint="unpack it and point to the folder")
        case _:
            raise DataError(
                f"`{path}` is no folder, list of files (.txt, .csv) or array archive (.npz)",
                hint="to use images, point to the folder they are in",
            )


def _guess_folder(path: Path) -> AnySource:
    from sslcli.data.cifar import found_in
    from sslcli.data.voc import found_in as voc_in

    for pack in (path, path / "train"):
        if os.path.isfile(pack / MANIFEST):
            return Packed(path=str(pack))
    if found_in(path, 10) is not None:
        return Cifar(root=path, classes=10)
    if found_in(path, 100) is not None:
        return Cifar(root=path, classes=100)
    if voc_in(path) is not None:
        return Voc(path=path)
    return Folder(path=path / "train" if _has_split(path) else path)


def _has_split(path: Path) -> bool:
    """Whether `path/train` holds training images, and not one class of them, such as trains."""
    train = path / "train"
    if not os.path.isdir(train):
        return False
    try:
        with os.scandir(path) as entries:
            beside = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
        with os.scandir(train) as entries:
            classes = any(entry.is_dir() for entry in entries)
    except OSError as error:
        raise DataError(f"cannot look into folder `{path}`: {error.strerror}") from None
    return classes or beside == {"train"} or bool(beside & SPLIT_FOLDERS)
