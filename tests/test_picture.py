"""Pictures of denoising: each frame is what there was after that forward, and no text becomes more than text."""

import io
import json
import random
from html.parser import HTMLParser

import pytest
from checkpoints import checkpoint, tokenizer
from PIL import Image, ImageColor, ImageOps

import picture
import sample
from display import CORRECTED, DRAFT, FRESH, MASK, MASKED, SETTLED, plain
from picture import GIVEN, STATES, Frame, Trace

NEW = ("--max_new_tokens", "8", "--steps", "8")
CASES = {  # name: checkpoint, flags, prompts
    "ar": ("ar", (), ["hi"]),
    "mdlm": ("mdlm", ("--threshold", "0.05"), ["hi"]),
    "mdlm, may mask again": ("mdlm", ("--remasking", "p2"), ["hi"]),
    "bd3lm": ("bd3lm", (), ["What is 1 + 2?"]),
    "speculation": ("causal", ("--speculate", "4"), ["What is 1 + 2?"]),
    "infilling": ("mdlm", ("--max_new_tokens", "0"), ["The <|mask|><|mask|> sat<|mask|>."]),
    "batch": ("bd3lm", (), ["hi", "another, longer prompt", "x"]),
}
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--",
    "{{player}}",
    "{{data}}",
    "&amp;",
    "'\"`${a}",
    "\n",
    "\x1b[1m",
]
HOSTILE += ["日本", "العربية", "$x$", "", " ", "]]>", "\u2028"]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs sample.py in an empty directory: run(argument, ...) -> (status, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        with pytest.raises(SystemExit) as exit:
            sample.main([str(argument) for argument in argv])
        return exit.value.code, capsys.readouterr().err

    return call


@pytest.fixture
def traced(run, monkeypatch):
    """The trace, and the answer, of the first prompt of a command."""

    def call(name: str, *argv) -> tuple[Trace, dict]:
        traces = []
        monkeypatch.setattr(sample, "picture", lambda trace, path: traces.append(trace) or b"")
        files = ("--picture", "p.gif", "--output", "rows.jsonl", "--overwrite")
        status, err = run("--model_name_or_path", checkpoint(name), *NEW, *argv, *files)
        assert status == 0, err
        with open("rows.jsonl") as rows:
            return *traces, json.loads(rows.readline())

    return call


def settling(texts: list[str], **fields) -> Trace:
    """A trace in which the tokens settle one by one from the left."""
    T = len(texts)
    frames = []
    for n in range(T + 1):
        states = [FRESH if t == n - 1 else SETTLED if t < n else MASKED for t in range(T)]
        frames.append(Frame(n, [(MASK if state == MASKED else text, state) for text, state in zip(texts, states)]))
    return Trace(texts, list(range(1, T + 1)), [0.5] * T, T, **{"title": "<b>", "frames": frames} | fields)


def gif(trace: Trace) -> list[Image.Image]:
    animation = Image.open(io.BytesIO(picture.animation(trace)))
    frames = []
    for n in range(animation.n_frames):
        animation.seek(n)
        frames.append(animation.convert("RGB"))
    return frames


def painted(image: Image.Image, colour: str) -> int:
    """How many pixels have a colour."""
    return image.tobytes().count(bytes(ImageColor.getrgb(colour)))


class Page(HTMLParser):
    """Reads a page whose tags must all be closed, in order: `data` of its player, `tags`, and attributes' `values`."""

    def __init__(self, page: bytes):
        super().__init__()
        self.open, self.tags, self.values, self.texts = [], [], [], []
        self.feed(page.decode())
        self.close()
        assert not self.open
        self.data = json.loads(self.texts[self.tags.index("script")])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.texts.append("")
        self.values += [value for name, value in attributes if name in ("src", "href", "srcset") or name[:2] == "on"]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == self.tags[-1]:
            self.texts[-1] += data

    def frames(self) -> list[tuple[str, list]]:
        """Count, and canvas of each frame, as the player reads them."""
        names, texts, frames = {name[0]: name for name, _ in self.data["states"]}, {}, []
        for count, states, changed in self.data["frames"]:
            texts |= {int(t): text for t, text in changed.items()}
            frames.append((count, [(texts[t], names[letter]) for t, letter in enumerate(states)]))
        return frames


# ---------------------------------------------------------------------------------------------------------------------
# What there was


@pytest.mark.parametrize("case", CASES)
def test_the_frames_lead_from_masks_to_the_first_answer(traced, case):
    name, flags, prompts = CASES[case]
    trace, row = traced(name, *flags, "--", *prompts)
    frames = trace.frames
    states = [[state for _, state in frame.canvas] for frame in frames]
    assert len(frames) == trace.forwards + 1 == row["forwards"] + 1
    assert frames[0].tokens == 0 and set(states[0]) <= {GIVEN, MASKED} and frames[-1].tokens == row["tokens"]
    assert plain(frames[-1].canvas) == row["answer"] and not {MASKED, DRAFT} & set(states[-1])
    assert trace.prompt == prompts[0] and f"{row['tokens']} tokens in {row['forwards']} forwards" in trace.title
    # Only what has just settled is fresh, and each forward settles something.
    for n in range(1, len(frames)):
        new = [t for t, state in enumerate(states[n]) if state in (FRESH, CORRECTED)]
        assert all(states[n - 1][t] in (MASKED, DRAFT) for t in new)
        assert new or len(states[n]) < len(states[n - 1])  # an end token alone, which is not shown
    assert (GIVEN in states[0]) == (case == "infilling")
    kinds = {state for row in states for state in row}
    assert ({DRAFT, CORRECTED} <= kinds) == (case == "speculation")
    assert (states[0].count(MASKED) > 0) and all(len(row) <= len(states[0]) for row in states)


@pytest.mark.parametrize(
    ("name", "flags", "borders"),
    (
        ("mdlm", ("--block_size", "4"), [4]),
        ("mdlm", (), []),
        ("bd3lm", ("--block_align", "prompt"), [4]),
        ("bd3lm", (), None),
        ("ar", (), []),
    ),
)
def test_a_picture_has_the_borders_of_blocks(traced, name, flags, borders):
    prompt = "What is 1 + 2?"
    trace, _ = traced(name, *flags, prompt)
    ids, _ = tokenizer().render([{"role": "user", "content": prompt}], reply=True)
    if borders is None:
        borders = [t for t in range(1, 8) if (len(ids) + t) % 4 == 0]
    assert list(trace.borders) == borders == Page(picture.page(trace)).data["borders"]
    without = trace._replace(borders=())
    assert (picture.animation(trace) == picture.animation(without)) == (not borders)
    assert (picture.still(trace) == picture.still(without)) == (not borders)


# ---------------------------------------------------------------------------------------------------------------------
# The files


@pytest.mark.parametrize("objective", ("ar", "mdlm", "bd3lm"))
def test_the_suffix_says_what_is_written(run, tmp_path, objective):
    for name in ("deep/p.png", "p.gif", "p.html"):
        flags = ("--model_name_or_path", checkpoint(objective), *NEW, "--picture", name)
        status, err = run("What is 1 + 2?", "other", *flags)
        assert status == 0 and not err, err
    assert (tmp_path / "deep" / "p.png").read_bytes().startswith(b"\x89PNG")
    frames = Page((tmp_path / "p.html").read_bytes()).data["frames"]
    assert Image.open(tmp_path / "p.gif").n_frames == len(frames) > 1


@pytest.mark.parametrize("name", ("p.jpg", "p", "p.GIF"))
def test_another_suffix_is_refused_before_there_is_a_model(run, name):
    status, err = run("hi", "--model_name_or_path", "nowhere", "--picture", name)
    assert status == 2 and err == f"sample.py: --picture {name}: expected a name that ends in .png or .gif or .html\n"


@pytest.mark.parametrize("prompt", ("hi", ""), ids=repr)
def test_a_picture_of_nothing_is_refused_before_the_work(run, prompt):
    flags = ("--model_name_or_path", checkpoint("mdlm"), "--max_new_tokens", "0", "--picture", "p.gif")
    status, err = run(prompt, *flags)
    assert status == 2 and err.startswith("sample.py: --picture: the first prompt has no mask") and err.count("\n") == 1


def test_an_animation_is_as_wide_as_a_readme_and_holds_its_last_frame():
    trace = settling(["The", " quick", " brown", " fox", ".\n", "The", " end"], borders=[4], prompt="Tell me.\n" * 9)
    animation = Image.open(io.BytesIO(picture.animation(trace)))
    assert animation.n_frames == len(trace.frames) and animation.width == 800 and animation.info["loop"] == 0
    durations = []
    for n in range(animation.n_frames):
        animation.seek(n)
        durations.append(animation.info["duration"])
    assert durations[0] == 1000 and durations[-1] == 3000 and set(durations[1:-1]) == {500}


def test_an_animation_shows_masks_become_text_in_their_places():
    frames = gif(settling(["The", " quick", " brown", " fox", ".\n", "The", " end"]))
    masks, settled, fresh = (
        [painted(frame, STATES[state][1]) for frame in frames] for state in (MASKED, SETTLED, FRESH)
    )
    assert masks == sorted(masks, reverse=True) and len(set(masks)) == len(masks)
    assert settled[1:] == sorted(settled[1:]) and fresh[0] < min(fresh[1:])
    # Each line is as long as its masks were, but for a pixel of a letter.
    for line in ((0, 64, 800, 91), (0, 91, 800, 118)):
        lengths = [ImageOps.invert(frame.crop(line)).getbbox() for frame in frames]
        assert all(abs(a - b) <= 1 for length in lengths for a, b in zip(length, lengths[0], strict=True))


def test_an_animation_of_64_tokens_is_small():
    choose = random.Random(0)
    words = [choose.choice((" denoising", " the", " of", " language", "s", ",", " model", ".")) for _ in range(64)]
    assert len(picture.animation(settling(words, borders=range(4, 64, 4)))) < 300_000


def test_a_page_needs_nothing_else_and_its_frames_are_those_of_the_trace():
    trace = settling(["a", "", " b\n", " c"])
    trace.frames[2].canvas[3] = (" draft\n", DRAFT)
    trace.frames[3].canvas[3] = (" c", CORRECTED)
    page = Page(picture.page(trace))
    assert not page.values and b"://" not in picture.page(trace) and "link" not in page.tags
    frames = page.frames()
    # A mask has the text that it becomes, to be as wide; a draft breaks no line.
    assert frames[0] == ("forward 0/4, 0 tokens", [(text, MASKED) for text in ("a", "·", " b↵\n", " c")])
    assert frames[2][0] == "forward 2/4, 2 tokens, 1.00 tokens per forward"
    assert frames[2][1][1:] == [("·", FRESH), (" b↵\n", MASKED), (" draft↵", DRAFT)]
    assert [state for _, state in frames[3][1]] == [SETTLED, SETTLED, FRESH, CORRECTED]
    assert [name for name, _ in page.data["states"]] == [MASKED, DRAFT, FRESH, SETTLED, CORRECTED]
    assert len({state[0] for state in STATES}) == len(STATES)  # a letter stands for each


def test_hostile_text_stays_text():
    trace = settling(HOSTILE, title=HOSTILE[0], prompt="".join(HOSTILE), borders=[2])
    content = picture.page(trace)
    page, harmless = Page(content), Page(picture.page(settling(["x"] * len(HOSTILE))))
    assert page.tags == harmless.tags and not page.values and b"<img" not in content
    assert content.count(b"</script>") == 2 and b"innerHTML" not in content
    assert page.data["texts"] == HOSTILE and page.data["prompt"] == "".join(HOSTILE)
    assert page.data["title"] == HOSTILE[0]
    assert len(gif(trace)) == len(trace.frames)
    assert picture.still(trace._replace(prompt="$x" * 500)).startswith(b"\x89PNG")


def test_an_answer_that_ends_at_once_is_drawn():
    trace = Trace([""] * 4, [-1, -1, 1, -1], [0.0] * 4, 1, "t", frames=[Frame(0, [(MASK, MASKED)] * 4), Frame(1, [])])
    first, last = gif(trace)
    assert painted(first, STATES[MASKED][1]) > painted(last, STATES[MASKED][1])
    assert [len(canvas) for _, canvas in Page(picture.page(trace)).frames()] == [4, 0]


def test_colours_tell_when_and_how_sure():
    early, late, unsure = (picture.colour(*x, 10) for x in ((1, 1.0), (10, 1.0), (1, 0.1)))
    assert early == picture.ANCHORS[0] and late == picture.ANCHORS[-1] and min(unsure) > 190
    assert picture.colour(0, 0.0, 10) == picture.KNOWN and picture.colour(-1, 0.0, 10) == picture.HOLE
