"""Images as points in the plane: a picture, or a page that shows the image under the pointer."""

import base64
import colorsys
import io
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sslcli.errors import SslError

SIDE = 64
"""Longest side of a small picture on the page, in pixels."""
NAMED = 20
"""Most classes that a picture names."""

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


def draw(points: F32, labels: I64 | None, classes: Sequence[str], title: str, path: Path) -> None:
    """Write a PNG of points (N, 2), coloured by label (N,) where there are labels.

    Raises:
        SslError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#dddddd")
    tints = colours(max(1, len(classes)))
    size = float(np.clip(8000 / len(points), 3, 30))
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=size, c="#2a6fb0", linewidths=0)
    else:
        axes.scatter(points[:, 0], points[:, 1], s=size, c=[tints[label] for label in labels], linewidths=0)
        for number, name in enumerate(classes[:NAMED]):
            axes.scatter([], [], s=30, c=tints[number], label=name)
        if 1 < len(classes) <= NAMED:
            axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    _write(path, buffer.getvalue())


def page(
    points: F32,
    labels: I64 | None,
    classes: Sequence[str],
    names: Sequence[str],
    pictures: Sequence[npt.NDArray[np.uint8]],
    title: str,
    path: Path,
) -> None:
    """Write an HTML page that needs nothing else: points (N, 2), and under the pointer the image and its name.

    Args:
        points: (N, 2).
        labels: (N,) numbers into `classes`, or None.
        classes: names of the classes.
        names: (N,) names of the images.
        pictures: N images (H, W, 3).
        title: one line.
        path: the file.

    Raises:
        SslError: the file cannot be written.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    places = (points - low) / np.maximum(high - low, 1e-9)
    data = {
        "title": title,
        "points": np.round(places, 4).tolist(),
        "labels": None if labels is None else labels.tolist(),
        "classes": list(classes),
        "colours": colours(max(1, len(classes))) if labels is not None else ["#2a6fb0"],
        "names": list(names),
        "pictures": [_small(picture) for picture in pictures],
    }
    text = json.dumps(data).replace("<", "\\u003c")  # so that no name can end the script
    _write(path, _PAGE.replace("DATA", text).encode("utf-8", "backslashreplace"))


def colours(count: int) -> list[str]:
    """So many colours that differ in hue, and between neighbours in lightness too."""
    made = []
    for number in range(count):
        light = (0.45, 0.62)[number % 2]
        rgb = colorsys.hls_to_rgb(number / count, light, 0.65)
        made.append("#" + "".join(f"{round(255 * part):02x}" for part in rgb))
    return made


def _small(picture: npt.NDArray[np.uint8]) -> str:
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise SslError(f"cannot write `{path}`: {error.strerror or error}", hint="choose another `--out`") from error


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>ssl tsne</title><style>
body { margin: 0; font: 14px sans-serif; display: flex; height: 100vh; }
main { flex: 1; display: flex; flex-direction: column; min-width: 0; }
h1 { font-size: 14px; font-weight: normal; margin: 8px 12px; }
canvas { flex: 1; min-height: 0; width: 100%; }
aside { width: 190px; overflow-y: auto; padding: 8px; border-left: 1px solid #ddd; }
aside label { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; cursor: pointer; }
aside i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin: 0 6px; }
#card { position: fixed; display: none; padding: 6px; background: #fff; border: 1px solid #888; pointer-events: none; }
#card img { display: block; width: 128px; image-rendering: pixelated; }
#card div { max-width: 240px; overflow-wrap: anywhere; font-size: 12px; margin-top: 4px; }
</style></head><body><main><h1></h1><canvas></canvas></main><aside></aside>
<div id="card"><img alt=""><div></div></div><script>
const data = DATA;
const canvas = document.querySelector("canvas"), card = document.getElementById("card");
const shown = new Set(data.classes.keys());
document.querySelector("h1").textContent = data.title;
const visible = i => data.labels === null || shown.has(data.labels[i]);
const tint = i => data.colours[data.labels === null ? 0 : data.labels[i]];
const place = i => [12 + data.points[i][0] * (canvas.width - 24),
                    canvas.height - 12 - data.points[i][1] * (canvas.height - 24)];
function draw(marked) {
  canvas.width = canvas.clientWidth; canvas.height = canvas.clientHeight;
  const pen = canvas.getContext("2d");
  for (let i = 0; i < data.points.length; i++) {
    if (!visible(i)) continue;
    const [x, y] = place(i);
    pen.beginPath(); pen.arc(x, y, i === marked ? 7 : 3.5, 0, 7); pen.fillStyle = tint(i); pen.fill();
  }
}
canvas.addEventListener("mousemove", event => {
  let best = -1, least = 225;
  for (let i = 0; i < data.points.length; i++) {
    if (!visible(i)) continue;
    const [x, y] = place(i), away = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
    if (away < least) { least = away; best = i; }
  }
  draw(best);
  card.style.display = best < 0 ? "none" : "block";
  if (best < 0) return;
  card.querySelector("img").src = "data:image/jpeg;base64," + data.pictures[best];
  const kind = data.labels === null ? "" : data.classes[data.labels[best]] + ": ";
  card.querySelector("div").textContent = kind + data.names[best];
  card.style.left = Math.min(event.clientX + 14, innerWidth - 270) + "px";
  card.style.top = Math.min(event.clientY + 14, innerHeight - 200) + "px";
});
canvas.addEventListener("mouseleave", () => { card.style.display = "none"; draw(-1); });
if (data.labels !== null) data.classes.forEach((name, number) => {
  const row = document.createElement("label"), box = document.createElement("input"), dot = document.createElement("i");
  box.type = "checkbox"; box.checked = true; dot.style.background = data.colours[number];
  box.addEventListener("change", () => { box.checked ? shown.add(number) : shown.delete(number); draw(-1); });
  row.append(box, dot, name); document.querySelector("aside").append(row);
});
addEventListener("resize", () => draw(-1));
draw(-1);
</script></body></html>
"""
