"""What the programs show of denoising: tokens as text, a terminal region that is redrawn in place, and pictures.

Token ids and plain numbers come in; nothing here knows a model.
"""

import html
import os
import sys
from pathlib import Path
from typing import NamedTuple

from rich.cells import cell_len

MASK, END = "░", "∎"  # a masked token; an end token with masks before it
MASKED, FRESH, SETTLED, STRONG = "2", "1;32", "", "1"  # SGR attributes: dim; bold green; none; bold


class Rate(NamedTuple):
    """What decoding cost. tokens: of answers, end tokens included; forwards: those a row was decoded by, over rows."""

    tokens: int = 0
    seconds: float = 0.0
    forwards: int = 0

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens in {self.seconds:.2f} s, {self.tokens / max(self.seconds, 1e-9):.1f} tokens/s, "
            f"{self.forwards} forwards, {self.tokens / max(self.forwards, 1):.2f} tokens per forward"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Tokens as text


def pieces(tokenizer, ids: list[int], masked: list[bool], *, skip_special_tokens: bool = True) -> list[str]:
    """The text each token adds to those before it, "" for a masked one; joined, an unmasked run's text.

    A character of several tokens belongs to its last. A token's text may depend on the one before it (a space between
    words), so each is decoded with that one.
    """
    assert len(ids) == len(masked)
    texts, before, begin = [], 0, 0  # ids[before:begin] are context, ids[begin:] not yet text
    for i, hole in enumerate(masked):
        texts.append("")
        if hole:
            before = begin = i + 1
            continue
        context = tokenizer.decode(ids[before:begin], skip_special_tokens=skip_special_tokens)
        text = tokenizer.decode(ids[before : i + 1], skip_special_tokens=skip_special_tokens)
        last = i + 1 == len(ids) or masked[i + 1]
        if not text.endswith("\ufffd") or last or i - begin >= 3:  # UTF-8 takes at most 4 bytes
            texts[i] = text[len(context) :]
            before, begin = begin, i + 1
    return texts


def spans(tokenizer, ids: list[int], masked: list[bool], fresh: list[bool], end_ids=()) -> list[tuple[str, str]]:
    """(text, style) of each token of an answer: masked, just settled (`fresh`) or settled; what ends it closes it."""
    shown = []
    for token, text, hole, new in zip(ids, pieces(tokenizer, ids, masked), masked, fresh):
        if hole:
            shown.append((MASK, MASKED))
        elif token in end_ids:
            if not any(style == MASKED for _, style in shown):
                break
            shown.append((END, FRESH if new else MASKED))
        else:
            shown.append((text, FRESH if new else SETTLED))
    return shown


def plain(shown: list[tuple[str, str]]) -> str:
    return "".join(text for text, _ in shown)


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


def wrap(shown: list[tuple[str, str]], width: int) -> list[list[tuple[str, str]]]:
    """Lines of at most `width` cells, each a list of (character, style), broken after spaces and masks if possible.

    Together they hold every character: the space or line end at which a line was broken is its last.
    """
    lines, line, cells, breakable = [], [], 0, 0
    for text, style in shown:
        for character in text:
            size = cell_len(character)
            if character == "\n":
                lines.append([*line, ("\n", "")])
                line, cells, breakable = [], 0, 0
                continue
            if not character.isprintable():
                character, size = printable(character), 1
            if line and cells + size > width and (character != " " or cells > width):  # one space may hang over
                cut = breakable or len(line)
                lines.append(line[:cut])
                line = line[cut:]
                cells, breakable = sum(cell_len(each) for each, _ in line), 0
            line.append((character, style))
            cells += size
            if character in (" ", MASK, END):
                breakable = len(line)
    return [*lines, line] if line else lines


def printable(text: str) -> str:
    """`text` without control characters, which a terminal would obey, but for line ends."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "\ufffd" for c in text)


def coloured(line: list[tuple[str, str]]) -> str:
    """A line of `wrap` as text with SGR attributes; its line end is left out."""
    out, current = [], ""
    for character, style in line:
        if character == "\n":
            continue
        if style != current:
            out.append("\033[0m" + (f"\033[{style}m" if style else ""))
            current = style
        out.append(character)
    return "".join(out) + ("\033[0m" if current else "")


def terminal(stream) -> bool:
    """Whether `stream` is a terminal that moves its cursor; escape codes go nowhere else."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def encodable(text: str, stream) -> str:
    """`text` as `stream` can write it: where its encoding has no block characters, a mask is an underscore."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace(MASK, "_").replace(END, "|").encode(encoding, "replace").decode(encoding)
    return text


def styled(shown: list[tuple[str, str]], stream) -> str:
    """Spans as text to print to `stream`, with their attributes if it is a terminal."""
    colours = terminal(stream)
    parts = ((printable(text), style) for text, style in shown)
    return encodable(
        "".join(f"\033[{style}m{text}\033[0m" if style and colours else text for text, style in parts), stream
    )


class Region:
    """The last lines of a terminal, redrawn in place; what is printed above them stays. A context manager."""

    def __init__(self, stream=None):
        self.stream = sys.stdout if stream is None else stream
        self.drawn = []  # cells of each line on the screen

    def __enter__(self) -> "Region":
        self._write("\033[?25l")  # no cursor
        return self

    def __exit__(self, *_) -> None:
        self._write(self._erased() + "\033[?25h")

    @property
    def width(self) -> int:
        """Cells of a line; the last column stays free, as terminals differ in what they do once it is written."""
        return max(os.get_terminal_size(self.stream.fileno()).columns - 1, 1)

    def draw(self, lines: list[list[tuple[str, str]]], *, above: list[list[tuple[str, str]]] = ()) -> None:
        """Replaces the region by `lines` of `wrap`, as many as there is room for; `above` scrolls away."""
        room = max(os.get_terminal_size(self.stream.fileno()).lines - 1, 1)
        text = self._erased() + "".join(coloured(line) + "\r\n" for line in above)
        if len(lines) > room:
            note = f"… {len(lines) - room + 1} more lines"
            lines = [*lines[: room - 1], [(character, MASKED) for character in note[: self.width]]]
        self._write(text + "\r\n".join(map(coloured, lines)) + "\r")  # where the ^C of an interruption does no harm
        self.drawn = [sum(cell_len(character) for character, _ in line if character != "\n") for line in lines]

    def _erased(self) -> str:
        # A window made narrower since has folded what was drawn into more rows.
        columns = self.width + 1
        rows = sum(max(1, -(-cells // columns)) for cells in self.drawn)
        self.drawn = []
        return "\r" + (f"\033[{rows - 1}A" if rows > 1 else "") + "\033[J"

    def _write(self, text: str) -> None:
        self.stream.write(encodable(text, self.stream))
        self.stream.flush()


class Stream:
    """An answer on its way, token by token settled: `show` it at each step, `close` it at the end.

    On a terminal what is certain scrolls away and the rest is redrawn in place; elsewhere settled text is written once
    nothing before it is masked, and nothing is ever taken back. revocable: settled tokens may be masked again, so
    nothing is certain before the end.
    """

    def __init__(self, stream=None, *, live: bool = True, revocable: bool = False):
        self.stream = sys.stdout if stream is None else stream
        self.revocable = revocable
        self.region = Region(self.stream) if live and terminal(self.stream) else None
        self.written = 0  # characters

    def __enter__(self) -> "Stream":
        if self.region:
            self.region.__enter__()
        return self

    def __exit__(self, *_) -> None:
        if self.region:
            self.region.__exit__()

    def show(self, shown: list[tuple[str, str]]) -> None:
        first = next((i for i, (_, style) in enumerate(shown) if style == MASKED), len(shown))
        settled = "" if self.revocable else plain(shown[:first])
        if self.region is None:
            settled = settled.rstrip("\ufffd") if first < len(shown) else settled  # a character to be completed
            self._write(printable(settled[self.written :]))
            self.written = max(self.written, len(settled))
            return
        lines = wrap(_skip(shown, self.written), self.region.width)
        # Of the line with the first mask the first word is not certain, and so neither is the line before it.
        certain, count = 0, self.written
        while certain < len(lines) and count + len(lines[certain]) <= len(settled):
            count += len(lines[certain])
            certain += 1
        above = lines[: max(certain - 1, 0)]
        self.written += sum(map(len, above))
        self.region.draw(lines[len(above) :], above=above)

    def close(self, shown: list[tuple[str, str]]) -> None:
        """Writes what is missing of the whole answer."""
        rest = _skip(shown, self.written)
        if self.region:
            self.region.draw([], above=wrap(rest, self.region.width) or [[]])
        else:
            self._write(printable(plain(rest)) + "\n")

    def _write(self, text: str) -> None:
        self.stream.write(encodable(text, self.stream))
        self.stream.flush()


def _skip(shown: list[tuple[str, str]], characters: int) -> list[tuple[str, str]]:
    rest = []
    for text, style in shown:
        rest.append((text[characters:], style))
        characters = max(0, characters - len(text))
    return rest


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


class Trace(NamedTuple):
    """How a canvas was denoised. For each position its token's text, the forward that settled it (0: given, -1: none,
    as the answer ended before), and the model's probability of it then; and the number of forwards."""

    texts: list[str]
    settled: list[int]
    confidence: list[float]
    forwards: int
    title: str


ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis at 0, 1/4, ... 1
HOLE, GIVEN = (236, 236, 236), (190, 190, 190)


def colour(settled: int, confidence: float, forwards: int) -> tuple[int, int, int]:
    """RGB of a token: the hue tells when it settled, from violet (first) to yellow (last); pale is unsure."""
    if settled < 1:
        return HOLE if settled else GIVEN
    place = (settled - 1) / max(forwards - 1, 1) * (len(ANCHORS) - 1)
    i = min(int(place), len(ANCHORS) - 2)
    strength = 0.15 + 0.85 * min(max(confidence, 0.0), 1.0)
    hue = (a + (b - a) * (place - i) for a, b in zip(ANCHORS[i], ANCHORS[i + 1]))
    return tuple(round(255 + (channel - 255) * strength) for channel in hue)


def picture(trace: Trace, path: str | Path) -> bytes:
    """Content of a .png or .html: position x forward, each token coloured from the forward on that settled it."""
    return page(trace).encode() if Path(path).suffix == ".html" else _png(trace)


def _png(trace: Trace) -> bytes:
    import io
    import warnings

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    T, S = len(trace.texts), trace.forwards
    image = np.full((S + 1, T, 3), HOLE, np.uint8)  # row s: after forward s
    for t, (settled, confidence) in enumerate(zip(trace.settled, trace.confidence)):
        image[settled:, t] = colour(settled, confidence, S)
    figure = plt.figure(figsize=(min(max(0.2 * T, 4), 24) + 2.6, min(max(0.14 * S, 2), 16) + 1.7), layout="constrained")
    axes, scale = figure.subplots(1, 2, width_ratios=(max(0.2 * T, 4), 1.1))
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(-0.5, T - 0.5, S + 0.5, -0.5))
    axes.set_xlabel("position")
    if T <= 80:
        labels = [_label(text) for text in trace.texts]
        axes.set_xticks(range(T), labels, rotation=90, fontsize=7, family="monospace")
        axes.set_xlabel("token")
    axes.set_ylabel("forward")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title(trace.title, fontsize=9, loc="left")
    key = np.array([[colour(s, c, S) for c in np.linspace(0, 1, 24)] for s in range(1, max(S, 1) + 1)], np.uint8)
    scale.imshow(key, aspect="auto", extent=(0, 1, max(S, 1) + 0.5, 0.5))
    scale.set_xlabel("confidence", fontsize=8)
    scale.set_ylabel("settled at forward", fontsize=8)
    scale.tick_params(labelsize=7)
    scale.yaxis.get_major_locator().set_params(integer=True)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the font has not every script's; a box stands in
        figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()


def _label(text: str) -> str:
    """A token's text in a few characters, white space made visible; a dollar sign would begin a formula."""
    text = printable(text).replace("\n", "\\n").replace(" ", "␣").replace("$", r"\$")
    return (text[:11] + "…" if len(text) > 12 else text) or "·"


def page(trace: Trace) -> str:
    """A page that needs nothing else: the text coloured, below it position x forward; hovering tells the numbers."""
    T, S = len(trace.texts), trace.forwards
    width, height = 14, max(3, min(14, 600 // (S + 1)))
    words, bars = [], []
    for t, (text, settled, confidence) in enumerate(zip(trace.texts, trace.settled, trace.confidence)):
        red, green, blue = colour(settled, confidence, S)
        when = f"settled at forward {settled} of {S}, confidence {confidence:.3f}"
        if settled < 1:
            when, settled = "still masked" if settled else "given", 0
        tip = html.escape(f"position {t}: {text!r}\n{when}")
        ink = "#fff" if red * 0.3 + green * 0.59 + blue * 0.11 < 130 else "#000"
        shown = html.escape(text or "·").replace("\n", "↵\n")
        words.append(f'<span style="background:rgb({red},{green},{blue});color:{ink}" title="{tip}">{shown}</span>')
        bars.append(
            f'<g><title>{tip}</title><rect x="{t * width}" y="0" width="{width - 1}" height="{settled * height}" '
            f'fill="rgb{HOLE}"/><rect x="{t * width}" y="{settled * height}" width="{width - 1}" '
            f'height="{(S + 1 - settled) * height}" fill="rgb({red},{green},{blue})"/></g>'
        )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(trace.title)}</title>
<style>
body {{ font: 15px/1.7 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
pre {{ font: 15px/1.8 ui-monospace, monospace; white-space: pre-wrap }}
span {{ border-radius: 3px; padding: 1px 0 }} span:hover, g:hover {{ outline: 2px solid #d33 }}
.scroll {{ overflow-x: auto }}
</style></head><body>
<h1 style="font-size:1.1em">{html.escape(trace.title)}</h1>
<p>Colour: when a token settled, from violet (first forward) to yellow (last, {S}); pale: unsure; grey: masked or given.
Hover for the numbers.</p>
<pre>{"".join(words)}</pre>
<div class="scroll"><svg width="{T * width}" height="{(S + 1) * height}" role="img"
aria-label="position by forward">{"".join(bars)}</svg></div>
<p>Across: position. Down: forward, 0 to {S}.</p>
</body></html>
"""
