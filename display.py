"""What the programs show of denoising: tokens as text, and the end of a terminal that is redrawn.

Token ids and plain numbers come in; nothing here knows a model. A token is settled once it is no longer masked."""

import os
import sys
from itertools import accumulate, groupby

from rich.cells import cell_len

MASK, END = "░", "∎"  # a masked token; an end token with masks before it
LEGEND = f"{MASK} masked  {END} ends the answer, once nothing before it is masked  [drafted, by --speculate]"
# What a token is: masked; drafted by speculation; just settled; settled before; just settled where another was drafted.
MASKED, DRAFT, FRESH, SETTLED, CORRECTED = "masked", "draft", "fresh", "settled", "corrected"
STRONG = "strong"  # of text that is no token's
SGR = {MASKED: "2", FRESH: "1;32", CORRECTED: "1;31", STRONG: "1"}  # attributes: dim; bold green; bold red; bold
Spans = list[tuple[str, str]]  # texts, each with its style: one of these, or none


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
    """Each token of an answer as text with its state, up to its end token. fresh: what has just settled. Of speculation
    also which of the masked ones hold a `draft`, and which of the fresh ones stand where another was drafted."""
    shown, drafted, corrected = [], draft or [False] * len(ids), corrected or [False] * len(ids)
    texts = pieces(tokenizer, ids, [hole and not known for hole, known in zip(masked, drafted)])
    for i, (token, text, hole, new) in enumerate(zip(ids, texts, masked, fresh)):
        # With masks before it, an end token does not end the answer yet, and is shown as a sign.
        if token in end_ids and (drafted[i] or not hole):
            if not any(masked[: i + 1]):
                break
            text = END
        if drafted[i]:
            shown.append((text, DRAFT))
        elif hole:
            shown.append((MASK, MASKED))
        else:
            shown.append((text, CORRECTED if corrected[i] else FRESH if new else SETTLED))
    return shown


def bracketed(shown: Spans) -> Spans:
    """The same for a terminal, which may have no colours: drafts as masks are, in brackets."""
    printed = []
    for state, run in groupby(shown, key=lambda span: span[1]):
        if state == DRAFT:
            printed += [("[", MASKED), *((text, MASKED) for text, _ in run), ("]", MASKED)]
        else:
            printed += run
    return printed


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
    runs = ((SGR.get(style), plain(run)) for style, run in groupby(shown, key=lambda span: span[1]))
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
