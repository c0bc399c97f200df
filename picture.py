"""Pictures of how a canvas was denoised: a still one, an animation, and a page that plays it.

Plain values come in; nothing here knows a model. What plays in a browser is in page/."""

import io
import json
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.cells import cell_len

from display import (
    CORRECTED,
    DRAFT,
    END,
    FRESH,
    MASK,
    MASKED,
    SETTLED,
    Spans,
    one_line,
    plain,
    printable,
    shorten,
    wrap,
)

ENDINGS = ".png", ".gif", ".html"


class Frame(NamedTuple):
    """A canvas after a forward: how many tokens of the answer have settled, and each token's text and state."""

    tokens: int
    canvas: Spans


class Trace(NamedTuple):
    """How a canvas was denoised. For each position its token's text, the forward that settled it (0: given, -1: none,
    as the answer ended before), and the model's probability of it then; the number of forwards; and the canvas before
    the first and after each of them."""

    texts: list[str]
    settled: list[int]
    confidence: list[float]
    forwards: int
    title: str
    prompt: str = ""  # what comes before the canvas
    borders: Sequence[int] = ()  # positions at which a block begins
    frames: Sequence[Frame] = ()


def picture(trace: Trace, path: str | Path) -> bytes:
    """The content of a file that ends in one of ENDINGS."""
    return {".png": still, ".gif": animation, ".html": page}[Path(path).suffix](trace)


# ---------------------------------------------------------------------------------------------------------------------
# A still picture: position x forward


ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis at 0, 1/4, ... 1
HOLE, KNOWN = (236, 236, 236), (190, 190, 190)


def colour(settled: int, confidence: float, forwards: int) -> tuple[int, int, int]:
    """RGB of a token. Its hue is when it settled, from violet (first) to yellow (last); a pale colour is unsure."""
    if settled < 1:
        return HOLE if settled else KNOWN
    # Between the two nearest anchors, then towards white.
    position = (settled - 1) / max(forwards - 1, 1) * (len(ANCHORS) - 1)
    hue = [np.interp(position, range(len(ANCHORS)), channel) for channel in zip(*ANCHORS)]
    strength = 0.15 + 0.85 * min(max(confidence, 0.0), 1.0)
    return tuple(round(255 + (channel - 255) * strength) for channel in hue)


def still(trace: Trace) -> bytes:
    """A .png: each token is coloured from the forward on that settled it."""
    from matplotlib.figure import Figure  # half a second, which only a picture is worth

    # On the left the canvas: its row s is what had settled after forward s.
    T, S = len(trace.texts), trace.forwards
    image = np.full((S + 1, T, 3), HOLE, np.uint8)
    for t, (settled, confidence) in enumerate(zip(trace.settled, trace.confidence)):
        image[settled:, t] = colour(settled, confidence, S)
    figure = Figure((min(max(0.2 * T, 4), 24) + 2.6, min(max(0.14 * S, 2), 16) + 1.7), layout="constrained")
    axes, scale = figure.subplots(1, 2, width_ratios=(max(0.2 * T, 4), 1.1))
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(-0.5, T - 0.5, S + 0.5, -0.5))
    axes.set(xlabel="token" if T <= 80 else "position", ylabel="forward")
    for border in trace.borders:
        axes.axvline(border - 0.5, color="black", linewidth=0.6)

    # No dollar sign begins a formula, and in labels white space is visible.
    width = max(int(max(0.2 * T, 4) * 14), 60)  # characters above the canvas
    prompt = [shorten(one_line(trace.prompt), width).replace("$", r"\$")] if trace.prompt else []
    axes.set_title("\n".join([*prompt, trace.title]), fontsize=9, loc="left")
    if T <= 80:
        visible = str.maketrans({"\n": "\\n", " ": "␣", "$": r"\$"})
        labels = [shorten(printable(text).translate(visible), 12) or "·" for text in trace.texts]
        axes.set_xticks(range(T), labels, rotation=90, fontsize=7, family="monospace")

    # On the right what the colours mean.
    last = max(S, 1)
    key = np.array([[colour(s, c, S) for c in np.linspace(0, 1, 24)] for s in range(1, last + 1)], np.uint8)
    scale.imshow(key, aspect="auto", extent=(0, 1, last + 0.5, 0.5))
    scale.set(xlabel="confidence", ylabel="settled at forward")
    for each in (axes, scale):
        each.yaxis.get_major_locator().set_params(integer=True)

    # The font lacks some scripts; a box stands for a character of those.
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# What the animation and the page share

GIVEN = "given"  # the state of what is not to be filled in
STATES = {  # what the legend calls it, its background and its ink
    GIVEN: ("given", "#ffffff", "#57606a"),
    MASKED: ("masked", "#d5dae1", "#d5dae1"),
    DRAFT: ("draft", "#fbe3a1", "#7a5200"),
    FRESH: ("just settled", "#2c974b", "#ffffff"),
    SETTLED: ("settled", "#e3eefb", "#1f2328"),
    CORRECTED: ("settled, not as drafted", "#cf3a31", "#ffffff"),
}


def drawable(canvas: Spans, last: Sequence[str] = ()) -> Spans:
    """A canvas with what stands for line ends, for tokens without text, and for masks: these are bars, as long as the
    text that will be there (the `last` ones, as far as they are known), so that nothing moves when it settles."""
    shown = []
    for t, (text, state) in enumerate(canvas):
        if state == MASKED:
            text = last[t] if t < len(last) else MASK
        # A draft breaks no line: most are rejected, and what is after it would jump.
        shown.append(((text or "·").replace("\n", "↵" if state == DRAFT else "↵\n"), state))
    return shown


def canvases(trace: Trace) -> list[Spans]:
    """The frames' canvases, drawable."""
    last = [text for text, _ in trace.frames[-1].canvas]
    return [drawable(frame.canvas, last) for frame in trace.frames]


def legend(trace: Trace) -> list[str]:
    """The states that occur."""
    found = {state for frame in trace.frames for _, state in frame.canvas}
    return [state for state in STATES if state in found]


def counts(trace: Trace) -> list[str]:
    """For each frame how far it is."""
    total, texts = trace.forwards, []
    for forward, frame in enumerate(trace.frames):
        share = f", {frame.tokens / forward:.2f} tokens per forward" if forward else ""
        texts.append(f"forward {forward}/{total}, {frame.tokens} tokens{share}")
    return texts


def pace(trace: Trace) -> float:
    """Seconds from one frame to the next: eight for all of them, but not too slow or too fast to follow."""
    return min(max(8 / len(trace.frames), 0.06), 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# An animation


def animation(trace: Trace) -> bytes:
    """A .gif 800 pixels wide: the prompt, the canvas with a line before each block, how far it is, and a legend."""
    from matplotlib import get_data_path  # for its font
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    path = f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf"
    font, small = ImageFont.truetype(path, 17), ImageFont.truetype(path, 13)
    W, edge, height, cell = 800, 24, 27, font.getlength("0")  # the picture, its margin, a line, a character
    white, band, ink, faint, grey = "#ffffff", "#f3f5f7", "#1f2328", "#656d76", STATES[MASKED][1]

    # Lines of characters: of the prompt at most four, of each frame with the position of each character's token.
    columns = int((W - 2 * edge) / cell)
    prompt = [plain(line).rstrip("\n") for line in wrap([(trace.prompt.strip(), "")], columns)]
    prompt = prompt if len(prompt) <= 4 else [*prompt[:3], shorten(prompt[3], columns - 1) + "…"]
    flows = [wrap([(text, t) for t, (text, _) in enumerate(canvas)], columns) for canvas in canvases(trace)]
    occurring, ended = legend(trace), any(text == END for frame in trace.frames for text, _ in frame.canvas)
    top = 64 + height * len(prompt)
    bottom = top + height * max(map(len, flows)) + 14

    # All frames have one palette, of five shades from each background to its ink.
    pairs = [(white, ink), (band, ink), (band, faint), (grey, ink), *(state[1:] for state in STATES.values())]
    ends = np.array([[ImageColor.getrgb(end) for end in pair] for pair in pairs])  # (pairs, 2, 3)
    shades = np.linspace(ends[:, 0], ends[:, 1], 5)
    palette = Image.new("P", (1, 1))
    palette.putpalette(shades.round().astype(np.uint8).tobytes())

    def draw(canvas: Spans, lines: list[Spans], count: str, done: float) -> Image.Image:
        image = Image.new("RGB", (W, bottom + 76), white)
        pen = ImageDraw.Draw(image)
        pen.rectangle((0, 0, W, top - 18), fill=band)
        pen.text((edge, 14), "prompt", faint, small)
        pen.text((W - edge, 14), trace.title, faint, small, anchor="ra")
        for n, line in enumerate(prompt):
            pen.text((edge, 38 + height * n), line, ink, font)

        # The canvas, token by token; not the spaces at which a line was broken.
        before = -1
        for n, line in enumerate(lines):
            x, y = edge, top + height * n
            line = line[: len(plain(line).rstrip(" "))] if n + 1 < len(lines) else line
            for t, run in groupby(line, key=lambda span: span[1]):
                text, (_, background, foreground) = plain(run).rstrip("\n"), STATES[canvas[t][1]]
                end = x + cell * cell_len(text)
                pen.rectangle((x + 1, y, end - 1, y + height - 4), fill=background)
                pen.text((x, y + 1), text if foreground != background else "", foreground, font)
                if t in trace.borders and t != before:
                    pen.line((x, y - 2, x, y + height - 2), ink, 2)
                x, before = end, t

        # How far it is, as a bar and in words, and what the colours mean.
        pen.rectangle((edge, bottom, W - edge, bottom + 3), fill=grey)
        pen.rectangle((edge, bottom, edge + (W - 2 * edge) * done, bottom + 3), fill=ink)
        pen.text((edge, bottom + 12), count, ink, small)
        x = edge
        for state in occurring:
            name, background, foreground = STATES[state]
            end = x + small.getlength(f" {name} ")
            pen.rectangle((x, bottom + 38, end, bottom + 57), fill=background)
            pen.text((x, bottom + 40), f" {name} ", foreground if foreground != background else ink, small)
            x = end + 8
        if ended:
            pen.text((x, bottom + 40), f"{END} an end token", ink, small)
        return image.quantize(palette=palette, dither=Image.Dither.NONE)

    drawn = [
        draw(frame.canvas, lines, count, n / trace.forwards)
        for n, (frame, lines, count) in enumerate(zip(trace.frames, flows, counts(trace)))
    ]
    shown = [1000, *[round(1000 * pace(trace))] * (len(drawn) - 2), 3000]  # milliseconds
    buffer = io.BytesIO()
    drawn[0].save(buffer, "GIF", save_all=True, append_images=drawn[1:], duration=shown, loop=0)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# A page that plays it


def page(trace: Trace) -> bytes:
    """A .html that needs nothing else: page/player.html with the frames, each as what differs from the one before."""
    frames, known = [], {}
    for count, canvas in zip(counts(trace), canvases(trace)):
        changed = {t: text for t, (text, _) in enumerate(canvas) if known.get(t) != text}
        known |= changed
        frames.append((count, "".join(state[0] for _, state in canvas), changed))  # a letter for each state
    data = {name: getattr(trace, name) for name in ("title", "prompt", "borders", "texts", "settled")} | {
        "confidence": [round(confidence, 3) for confidence in trace.confidence],
        "states": [(state, STATES[state][0]) for state in legend(trace)],
        "pace": pace(trace),
        "frames": frames,
    }
    return filled("player.html", {name: read(f"{name}.js") for name in ("canvas", "playback", "player")}, data)


def filled(name: str, parts: dict[str, str], data: dict) -> bytes:
    """A file of page/ with the parts, the styles and the data in their places, {{...}}."""
    # A text that holds "</script>" would end the data: JSON can write "<" otherwise. It goes in last, so that nothing
    # in it is taken for the place of another part.
    text = json.dumps(data).replace("<", "\\u003c")
    whole = read(name)
    for place, part in {"states": styles(), "style": read("canvas.css"), **parts, "data": text}.items():
        whole = whole.replace(f"{{{{{place}}}}}", part)
    return whole.encode()


def read(name: str) -> str:
    """A file of page/."""
    return (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")


def styles() -> str:
    """The states as CSS classes."""
    rules = ((state, f"color: {ink}; background: {fill}; fill: {fill}") for state, (_, fill, ink) in STATES.items())
    return "\n".join(f".{state} {{ {rule} }}" for state, rule in rules)
