"""ssl data: is a set of images fit to learn from, and how is it stored so that it is read fast?"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sslcli.cli.options import Json
from sslcli.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np

    from sslcli.data.check import Doubles, Findings
    from sslcli.data.source import Source

app = typer.Typer(name="data", help="Check and pack images.", no_args_is_help=True, rich_markup_mode=None)

REASONS = ("unreadable", "equal", "near", "overlap")
SHOWN = 3

Images = Annotated[Path, typer.Argument(metavar="DIR", help="Images: a folder, a list file, an .npz or a pack.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=0, help="Processes; one for each processor when absent, 0 for none.")
]


@app.command()
def check(
    images: Images,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Images of the evaluation; those that are known to belong to DIR when absent."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write a skip list, for `data.source.skip`.")
    ] = None,
    drop: Annotated[
        str, typer.Option("--drop", help=f"What the skip list names: {', '.join(REASONS)}.")
    ] = "unreadable,equal,overlap",
    near: Annotated[
        int,
        typer.Option(
            "--near", min=-1, max=3, help="Bits in which the hashes of alike images may differ; -1: no hashes."
        ),
    ] = 3,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Find unreadable images, doubles, what the evaluation would see twice; say how large and how bright images are."""
    from sslcli.cli.terminal import Passes
    from sslcli.data import guess_source, open_source, other_split
    from sslcli.data.check import judge, measure
    from sslcli.data.workers import processors

    wanted = [word.strip() for word in drop.split(",") if word.strip()]
    if unknown := set(wanted) - set(REASONS):
        raise UserError(f"`--drop {unknown.pop()}`: there is {', '.join(REASONS)}")
    config = guess_source(images)
    other = other_split(config) if against is None else guess_source(against)
    source, judges = open_source(config), None if other is None else open_source(other)
    processes = processors() if workers is None else workers
    with Passes() as passes:
        source.verify()
        measured = measure(source, workers=processes, told=passes("images"))
        theirs = None if judges is None else measure(judges, workers=processes, told=passes("evaluation images"))
    found = judge(measured, near, theirs)
    if not len(found.good):
        raise DataError(f"none of {len(source)} images can be read", hint=next(iter(measured.reasons.values()), None))
    skips = dict(_skips(found, source, judges, wanted))
    if out is not None:
        _write_list(out, source, skips)
    if as_json:
        print(json.dumps(_facts(found, source, judges), indent=2))
    else:
        print("\n".join(_lines(found, source, judges)))
    if out is not None:
        print(f"{out} names {len(skips)} images", file=sys.stderr)
        skip = f" -o data.source.skip={out}" if skips else ""
        print(f"next: ssl pretrain --preset … --data {images}{skip}", file=sys.stderr)
    elif skips:
        print(f"next: ssl data check {images} --out skip.txt", file=sys.stderr)


def _skips(
    found: "Findings", source: "Source", judges: "Source | None", wanted: Sequence[str]
) -> Iterator[tuple[int, str]]:
    """Numbers of images to leave out, and why."""
    if "overlap" in wanted and judges is not None:
        for image, other, bits in _rows(found.overlap):
            yield image, f"{_how(bits)} {judges.name(other)} of the evaluation"
    for word, doubles in (("near", found.near), ("equal", found.equal)):
        if word in wanted:
            for image, other, bits in _rows(doubles):
                yield image, f"{_how(bits)} {source.name(other)}"
    if "unreadable" in wanted:
        yield from found.measured.reasons.items()


def _write_list(path: Path, source: "Source", skips: dict[int, str]) -> None:
    lines = [f"{source.name(index)}\t{why}" for index, why in sorted(skips.items())]
    try:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write `{path}`: {error.strerror}") from None


def _rows(doubles: "Doubles") -> Iterator[tuple[int, int, int]]:
    return zip(doubles.image.tolist(), doubles.other.tolist(), doubles.distance.tolist(), strict=True)


def _how(bits: int) -> str:
    return "equals" if bits < 0 else f"looks like (distance {bits})"


def _conflicts(found: "Findings", source: "Source") -> int:
    """Equal images that have different labels."""
    if source.labels is None:
        return 0
    return int((source.labels[found.equal.image] != source.labels[found.equal.other]).sum())


def _facts(found: "Findings", source: "Source", judges: "Source | None") -> dict[str, Any]:
    from sslcli.data.check import classes_of

    good = found.good

    def named(doubles: "Doubles", other: "Source") -> list[dict[str, Any]]:
        return [
            {"image": source.name(a), "other": other.name(b), "distance": None if bits < 0 else bits}
            for a, b, bits in _rows(doubles)
        ]

    return {
        "images": len(source),
        "ignored": source.ignored,
        "unreadable": {source.name(index): why for index, why in sorted(found.measured.reasons.items())},
        "kinds": found.kinds,
        "height": _spread(good["height"]),
        "width": _spread(good["width"]),
        "one_colour": int(good["flat"].sum()),
        "mean": found.mean,
        "std": found.std,
        "classes": dict(classes_of(source)),
        "equal": named(found.equal, source),
        "equal_with_other_label": _conflicts(found, source),
        "near": named(found.near, source),
        "overlap": None if judges is None else named(found.overlap, judges),
    }


def _spread(values: "np.ndarray") -> dict[str, int]:
    import numpy as np

    return {"least": int(values.min()), "median": int(np.median(values)), "most": int(values.max())}


def _lines(found: "Findings", source: "Source", judges: "Source | None") -> Iterator[str]:
    from sslcli.data.check import classes_of

    good, total = found.good, len(source)
    yield f"images         {total}" + (f"; {source.remark}" if source.remark else "")
    counts = [count for _, count in classes_of(source)]
    if counts:
        each = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"
        yield f"classes        {len(counts)}, with {each} images each"
    yield f"stored as      {', '.join(f'{kind} {count}' for kind, count in found.kinds.items())}"
    for side in ("height", "width"):
        spread = _spread(good[side])
        yield f"{side:<14} {spread['least']} to {spread['most']} px, median {spread['median']}"
    yield f"mean           {_three(found.mean)}"
    yield f"std            {_three(found.std)}"
    if good["flat"].any():
        yield f"one colour     {int(good['flat'].sum())}"
    bad = [f"{source.name(index)}: {why}" for index, why in sorted(found.measured.reasons.items())]
    yield from _section("unreadable", bad)
    conflicts = _conflicts(found, source)
    remark = f" ({conflicts} with another label)" if conflicts else ""
    yield from _section("equal", _told(found.equal, source, source), remark)
    yield from _section("look alike", _told(found.near, source, source))
    if judges is not None:
        remark = f" (of {len(judges)} evaluation images)"
        yield from _section("overlap", _told(found.overlap, source, judges), remark)
    else:
        yield "overlap        not looked for: `--against DIR` names the evaluation's images"


def _told(doubles: "Doubles", source: "Source", other: "Source") -> list[str]:
    return [f"{source.name(a)} {_how(bits)} {other.name(b)}" for a, b, bits in _rows(doubles)]


def _section(title: str, lines: Sequence[str], remark: str = "") -> Iterator[str]:
    yield f"{title:<14} {len(lines)}{remark}"
    yield from (f"    {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"    and {len(lines) - SHOWN} more (`--json` lists all)"


def _three(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


@app.command()
def pack(
    images: Images,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; an interrupted call goes on in it.")],
    encoding: Annotated[
        Literal["raw", "jpeg", "png"],
        typer.Option("--encoding", metavar="raw|jpeg|png", help="Pixels as they are: fastest; or compressed."),
    ] = "raw",
    size: Annotated[
        int | None, typer.Option("--size", min=8, help="Reduce larger images to this shorter side, in pixels.")
    ] = None,
    quality: Annotated[int, typer.Option("--quality", min=1, max=95, help="Of JPEG.")] = 90,
    per_shard: Annotated[int, typer.Option("--per-shard", min=1, help="Images in each file.")] = 4096,
    skip: Annotated[
        Path | None, typer.Option("--skip", help="List of images to leave out, as `ssl data check` writes it.")
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Store images in a few large files that are read by number, far faster than one file for each."""
    from sslcli.cli.terminal import Passes
    from sslcli.data import guess_source, open_source
    from sslcli.data import pack as packing
    from sslcli.data.part import without
    from sslcli.data.workers import processors

    source = open_source(guess_source(images))
    if skip is not None:
        source = without(source, skip)
    how = packing.How(encoding, size, quality, per_shard)
    processes = processors() if workers is None else workers
    try:
        with Passes() as passes:
            done = packing.pack(source, out, how, workers=processes, told=passes("images"))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise
    if as_json:
        facts = {"images": done.images, "skipped": done.skipped, "bytes": done.bytes, "shards_kept": done.kept}
        print(json.dumps({"folder": str(out), **facts}, indent=2))
        return
    left_out = f", {len(done.skipped)} unreadable ones left out (`{out / 'skipped.txt'}`)" if done.skipped else ""
    kept = f", {done.kept} shard(s) of an earlier call kept" if done.kept else ""
    print(f"{done.images} images, {done.bytes / 1e6:.1f} MB{left_out}{kept}", file=sys.stderr)
    print(out)
    print(f"next: ssl pretrain --preset … --data {out}", file=sys.stderr)
