"""The first and the last samples of a run: grids of images, or videos with a strip of frames each."""

from __future__ import annotations

from branchtree.report.images import Picture, embed
from branchtree.report.markup import escape, number
from branchtree.report.read import Run, SampleGrid
from branchtree.report.videos import embed_video

LONGEST_GRID = 1600  # pixels
SHARPEST_TILE = 96  # samples narrower than this are shown with square pixels


def samples(run: Run) -> str:
    """Return the first and the last samples side by side, and their prompts."""
    if not run.samples:
        return ""
    ends = run.samples if len(run.samples) < 2 else (run.samples[0], run.samples[-1])
    figures = "".join(_figure(run, grid) for grid in ends)
    pair, last = f'<div class="pair">{figures}</div>', ends[-1]
    if not last.prompts:
        return pair
    listed = "".join(f'<li class="prompt">{escape(prompt)}</li>' for prompt in last.prompts)
    row = f"row by row with {last.columns} a row"
    where = f"one strip each; in the video, {row}" if last.kind == "video" else row
    return f'{pair}<h3>Prompts, {where}</h3><ol class="prompts">{listed}</ol>'


def _figure(run: Run, grid: SampleGrid) -> str:
    when = "Before training" if grid.iteration == 0 else f"After {grid.iteration} iterations"
    if grid.kind == "image":
        return f"<figure><figcaption><b>{when}</b></figcaption>{_picture(run, grid)}</figure>"
    length = f"<span>{number(grid.frames)} frames, {number(grid.fps, 3)} a second</span>"
    return f"<figure><figcaption><b>{when}</b>{length}</figcaption>{_video(run, grid)}{_picture(run, grid)}</figure>"


def _picture(run: Run, grid: SampleGrid) -> str:
    picture = embed(grid.image, run.path, LONGEST_GRID)
    if picture is None:
        return '<p class="missing">The picture cannot be read.</p>'
    if grid.kind == "video":
        alt = f"Strips of {len(grid.strip)} frames of {len(grid.prompts)} samples after {grid.iteration} iterations, "
        return _img(picture, len(grid.strip), f"{alt}from left to right, one row per prompt listed below")
    alt = f"Grid of {len(grid.prompts)} samples after {grid.iteration} iterations, one per prompt listed below"
    return _img(picture, grid.columns, alt)


def _img(picture: Picture, columns: int, alt: str) -> str:
    size = f'width="{picture.width}" height="{picture.height}"'
    kind = _sharpness(picture.width, columns)
    return f'<img class="{kind}" {size} alt="{alt}" src="{picture.uri}">'


def _video(run: Run, grid: SampleGrid) -> str:
    """Return a video of the samples that plays on demand: autoplay without a script ignores reduced motion."""
    path = grid.image.with_suffix(".mp4")
    name = escape(path.relative_to(run.path).as_posix())
    video = embed_video(path, run.path)
    if video is None:
        return f'<p class="missing">{name} cannot be shown here: it is missing, damaged or too large.</p>'
    label = f"{len(grid.prompts)} samples after {grid.iteration} iterations, playing side by side"
    size = f'width="{video.width}" height="{video.height}" class="{_sharpness(video.width, grid.columns)}"'
    return (
        f'<video controls loop muted playsinline preload="auto" {size} aria-label="{label}" src="{video.uri}">'
        f"This browser cannot play the video; it is also in {name}.</video>"
    )


def _sharpness(width: int, columns: int) -> str:
    return "pixels" if width / max(columns, 1) < SHARPEST_TILE else "photo"
