"""What the programs show of denoising: tokens as text, the end of a terminal that is redrawn, and pictures.

Token ids and plain numbers come in; nothing here knows a model. A token is settled once it is no longer masked."""

import html
import io
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.cells import cell_len

MASK, END = "░", "∎"  # a masked token; an end token with masks before it
LEGEND = f"{MASK} masked  {END} ends the answer, once nothing before it is masked  [drafted, by --speculate]"
# SGR attributes: dim; bold green; none; bold; bold red, of what took the place of a draft token.
MASKED, FRESH, SETTLED, STRONG, CORRECTED = "2", "1;32", "", "1", "1;31"
Spans = list[tuple[str, str]]  # texts, each with its attributes


def cost(tokens: int, seconds: float, forwards: int) -> str:
    """What decoding took. tokens: of the answers, with their end tokens; forwards: model calls per row, added up."""
    speed, share = tokens / max(seconds, 1e-9), tokens / max(forwards, 1)
    took = f"{tokens} tokens in {seconds:.2f} s, {speed:.1f} tokens/s"
    return f"{took}, {forwards} forwards, {share:.2f} tokens per forward"


# ---------------------------------------------------------------------------------------------------------------------
# Tokens as text


def pieces(tokenizer, ids: list[int], masked: list[bool], *, skip_special_tokens: bool = True) -> list[str]:
    """The text that each token adds to those before it, "" for a masked one; together the text of the whole."""
    texts, before, begin = [], 0, 0  # ids[before:begin] are context, ids[begin:] have no text yet
    for i, hole in enumerate(masked):
        texts.append("")
        if hole:
            before = begin = i + 1
            continue
        # A token's text may depend on the one before it (a space between words): decode the two together.
        context = tokenizer.decode(ids[before:begin], skip_special_tokens=skip_special_tokens)
        text = tokenizer.decode(ids[before : i + 1], skip_special_tokens=skip_special_tokens)
        # Half a character decodes to U+FFFD: it belongs to the last of its tokens, 4 at most, as UTF-8 takes 4 bytes.
        last = i + 1 == len(ids) or masked[i + 1]
        if not text.endswith("\ufffd") or last or i - begin >= 3:
            texts[i] = text[len(context) :]
            before, begin = begin, i + 1
    return texts


def spans(
    tokenizer, ids: list[int], masked: list[bool], fresh: list[bool], end_ids=(), draft=None, corrected=None
) -> Spans:
    """Each token of an answer as text: masked, just settled (`fresh`) or settled; up to its end token. Of speculation
    also which of the masked ones hold a `draft`, and which of the fresh ones stand where another was drafted."""
    shown, drafted = [], draft or [False] * len(ids)
    texts = pieces(tokenizer, ids, [hole and not known for hole, known in zip(masked, drafted)])
    corrected = corrected or [False] * len(ids)
    for i, (token, text, hole, new) in enumerate(zip(ids, texts, masked, fresh)):
        if drafted[i]:
            first, last = i == 0 or not drafted[i - 1], i + 1 == len(ids) or not drafted[i + 1]
            shown += [("[", MASKED)] if first else []
            shown += [(END if token in end_ids else text, MASKED)]
            shown += [("]", MASKED)] if last else []
        elif hole:
            shown.append((MASK, MASKED))
        elif corrected[i] and token not in end_ids:
            shown.append((text, CORRECTED))
        elif token in end_ids:
            # With masks before it, it does not end the answer yet, and is shown as a sign.
            if not any(style == MASKED for _, style in shown):
                break
            shown.append((END, FRESH if new else MASKED))
        else:
            shown.append((text, FRESH if new else SETTLED))
    return shown


def plain(shown: Spans) -> str:
    return "".join(text for text, _ in shown)


def shorten(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


def terminal(stream) -> bool:
    """Whether `stream` is a terminal that understands escape codes; only such a one is sent any."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def printable(text: str) -> str:
    """`text` without control characters, which a terminal would obey, but with its line ends."""
    # Wide spaces and the joiners of some scripts count as unprintable, and do no harm.
    harmless = "\n\u00a0\u3000\u200c\u200d"
    return "".join(c if c.isprintable() or c in harmless else " " if c == "\t" else "\ufffd" for c in text)


def one_line(text: str) -> str:
    """`text` in one printable line."""
    return printable(" ".join(text.split()))


def characters(shown: Spans) -> Spans:
    """The same, printable, with a span for each character: a line may end within a token."""
    return [(character, style) for text, style in shown for character in printable(text)]


def write(text: str, stream) -> None:
    stream.write(text)
    stream.flush()


def show(shown: Spans, stream=None, *, end: str = "\n") -> None:
    """Prints spans, with their attributes if the stream is a terminal."""
    stream = sys.stdout if stream is None else stream
    text = coloured if terminal(stream) else plain
    write(text(characters(shown)) + end, stream)


def coloured(shown: Spans) -> str:
    """Spans as text with SGR attributes, those of one style together."""
    runs = ((style, plain(run)) for style, run in groupby(shown, key=lambda span: span[1]))
    return "".join(f"\033[{style}m{text}\033[0m" if style else text for style, text in runs)


def wrap(shown: Spans, width: int) -> list[Spans]:
    """Lines of at most `width` cells, a span for each character, broken after spaces and masks if possible."""
    # No character is lost, as `Stream` counts them; rich's Text.wrap drops the space at a line's end.
    lines, line, cells, breakable = [], [], 0, 0  # cells of the line, and how much of it may stand alone
    for character, style in characters(shown):
        # Where the character has no room, break the line. One space may hang over the edge, so that the next line does
        # not begin with it.
        size = cell_len(character)
        while line and character != "\n" and cells + size > width and (character != " " or cells > width):
            end = breakable or len(line)
            lines.append(line[:end])
            line, breakable = line[end:], 0
            cells = sum(map(cell_len, plain(line)))

        line.append((character, style))
        cells += size
        if character == "\n":
            lines.append(line)
            line, cells, breakable = [], 0, 0
        elif character in (" ", MASK, END):
            breakable = len(line)
    return [*lines, line] if line else lines


class Region:
    """The last lines of a terminal, redrawn in place; what is above them stays. Draw only where it is `live`."""

    def __init__(self, stream=None, *, live: bool = True):
        self.stream = sys.stdout if stream is None else stream
        self.live = live and terminal(self.stream)
        # Remember cells of each line: rich.live.Live counts lines, and leaves some behind in a window made narrower.
        self.drawn = []

    def __enter__(self):
        if self.live:
            write("\033[?25l", self.stream)  # no cursor
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.draw([])
            write("\033[?25h", self.stream)

    @property
    def width(self) -> int:
        """Cells of a line; the last column stays free, as terminals differ in what they do once it is written."""
        return max(os.get_terminal_size(self.stream.fileno()).columns - 1, 1)

    def draw(self, lines: list[Spans], *, above: list[Spans] = ()) -> None:
        """Replaces the region by `lines` of `wrap`, as many as there is room for, and writes `above` over it."""
        # Lines beyond the window's height would scroll away, out of reach: count them instead.
        room = max(os.get_terminal_size(self.stream.fileno()).lines - 1, 1)
        if len(lines) > room:
            note = f"… {len(lines) - room + 1} more lines"
            lines = [*lines[: room - 1], [(note[: self.width], MASKED)]]

        # Go up to the region's first row and clear the screen from there on. A window that was made narrower since has
        # folded each line that was drawn into several rows.
        up = sum(max(1, -(-cells // (self.width + 1))) for cells in self.drawn) - 1
        erase = "\r" + (f"\033[{up}A" if up > 0 else "") + "\033[J"
        # The cursor ends at the left edge, where the ^C of an interruption does no harm.
        rows = [coloured(line).replace("\n", "") for line in [*above, *(lines or [[]])]]
        write(erase + "\r\n".join(rows) + "\r", self.stream)
        self.drawn = [sum(map(cell_len, plain(line).replace("\n", ""))) for line in lines]


class Stream(Region):
    """An answer while it is denoised: `show` it at each step, `close` it at the end. revocable: settled tokens may be
    masked again, so nothing is certain before the end."""

    def __init__(self, stream=None, *, live: bool = True, revocable: bool = False):
        super().__init__(stream, live=live)
        self.revocable = revocable
        self.written = 0  # characters of the answer that were written for good

    def show(self, shown: Spans) -> None:
        # The text up to the first mask is settled; a mask may become a text of any length, so nothing is known of what
        # comes after it.
        first = next((i for i, (_, style) in enumerate(shown) if style == MASKED), len(shown))
        settled = "" if self.revocable else plain(shown[:first])

        # Where nothing can be taken back, write the settled text.
        if not self.live:
            # A character whose last tokens are still masked ends in U+FFFD: it has to wait for them.
            settled = settled.rstrip("\ufffd") if first < len(shown) else settled
            write(printable(settled[self.written :]), self.stream)
            self.written = max(self.written, len(settled))
            return

        # On a terminal, lines of settled text alone scroll away, and the rest is redrawn in place. The last of them is
        # not certain: the word after it may get shorter, and move up.
        lines = wrap(characters(shown)[self.written :], self.width)
        complete = sum(self.written + end <= len(settled) for end in accumulate(map(len, lines)))
        certain = lines[: max(complete - 1, 0)]
        self.written += sum(map(len, certain))
        self.draw(lines[len(certain) :], above=certain)

    def close(self, shown: Spans) -> None:
        """Writes what is missing of the whole answer."""
        rest = characters(shown)[self.written :]
        if self.live:
            self.draw([], above=wrap(rest, self.width) or [[]])
        else:
            write(plain(rest) + "\n", self.stream)


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
    prompt: str = ""  # what comes before the canvas
    borders: Sequence[int] = ()  # positions at which a block begins


ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis at 0, 1/4, ... 1
HOLE, GIVEN = (236, 236, 236), (190, 190, 190)


def colour(settled: int, confidence: float, forwards: int) -> tuple[int, int, int]:
    """RGB of a token. Its hue is when it settled, from violet (first) to yellow (last); a pale colour is unsure."""
    if settled < 1:
        return HOLE if settled else GIVEN
    # Between the two nearest anchors, then towards white.
    position = (settled - 1) / max(forwards - 1, 1) * (len(ANCHORS) - 1)
    hue = [np.interp(position, range(len(ANCHORS)), channel) for channel in zip(*ANCHORS)]
    strength = 0.15 + 0.85 * min(max(confidence, 0.0), 1.0)
    return tuple(round(255 + (channel - 255) * strength) for channel in hue)


def picture(trace: Trace, path: str | Path) -> bytes:
    """Content of a .png or .html: position x forward, each token coloured from the forward on that settled it."""
    return page(trace).encode() if Path(path).suffix == ".html" else _png(trace)


def _png(trace: Trace) -> bytes:
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


def page(trace: Trace) -> str:
    """A page that needs nothing else: the text coloured, below it position x forward; hovering tells the numbers."""
    S, words, bars = trace.forwards, [], []
    height = max(3, min(14, 600 // (S + 1)))  # pixels of a forward
    for t, (text, settled, confidence) in enumerate(zip(trace.texts, trace.settled, trace.confidence)):
        when = f"settled at forward {settled} of {S}, confidence {confidence:.3f}"
        when = {-1: "still masked", 0: "given"}.get(settled, when)
        tip = html.escape(f"position {t}: {text!r}\n{when}")

        # Each token twice: as text, in an ink that can be read on its colour ...
        red, green, blue = rgb = colour(settled, confidence, S)
        ink = "#fff" if red * 0.3 + green * 0.59 + blue * 0.11 < 130 else "#000"
        shown = html.escape(text or "·").replace("\n", "↵\n")
        border = ";border-left:1px solid #000" if t in trace.borders else ""
        words.append(f'<span style="background:rgb{rgb};color:{ink}{border}" title="{tip}">{shown}</span>')
        # ... and as a column that is grey above the forward which settled it.
        top = height * max(settled, 0)
        bars.append(
            f'<g transform="translate({14 * t})"><title>{tip}</title><rect width="13" height="{top}" fill="rgb{HOLE}"/>'
            f'<rect y="{top}" width="13" height="{height * (S + 1) - top}" fill="rgb{rgb}"/></g>'
            + (f'<rect x="{14 * t - 1}" width="1" height="{height * (S + 1)}"/>' if border else "")
        )
    title = html.escape(trace.title)
    prompt = f'<pre style="color:#777">{html.escape(trace.prompt)}</pre>' if trace.prompt else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.7 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
h1 {{ font-size: 1.1em }} pre {{ font: 15px/1.8 ui-monospace, monospace; white-space: pre-wrap }}
pre {{ overflow-wrap: anywhere }}
span {{ border-radius: 3px; padding: 1px 0 }} span:hover, g:hover {{ outline: 2px solid #d33 }}
</style></head><body><h1>{title}</h1>
<p>Colour: when a token settled, from violet (first forward) to yellow (last, {S}); pale: unsure; grey: masked or given.
A black line: a block begins. Hover for the numbers.</p>{prompt}<pre>{"".join(words)}</pre>
<div style="overflow-x: auto">
<svg width="{14 * len(bars)}" height="{height * (S + 1)}" role="img" aria-label="token x forward">{"".join(bars)}</svg>
</div><p>Across: position. Down: forward, 0 to {S}.</p></body></html>
"""
