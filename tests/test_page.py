"""serve.py's page, in a real browser: `pip install playwright`, a chromium, and `pytest -m slow tests/test_page.py`."""

import os
import shutil
import time
from contextlib import contextmanager

import pytest
from checkpoints import tokenizer
from test_serve import Running, alone, rendered

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; $CHROMIUM names one that is elsewhere"),
]
DESKTOP, PHONE = {"width": 1200, "height": 800}, {"width": 390, "height": 844}
PATIENCE = 300_000  # milliseconds, on a busy machine
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a directory


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """opened(server, size): its page, on which nothing may go wrong, and which asks nobody else."""
    pages, wrong = [], []

    def call(server: Running, size: dict = DESKTOP):
        page = browser.new_page(viewport=size)
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: request.url.startswith(address) or wrong.append(request.url))
        address = f"http://127.0.0.1:{server.port}/"
        page.goto(address)
        pages.append(page)
        return page

    yield call
    for page in pages:
        page.close()
    assert [line for line in wrong if "400 (Bad Request)" not in line] == []


@pytest.fixture(scope="module", params=["mdlm", "causal"])
def server(request):
    running = Running(request.param, max_new_tokens=24, steps=8)
    running.name = request.param
    yield running
    running.stop()


@contextmanager
def slowed(engine):
    """Its forwards take 0.3 s meanwhile."""
    advance = engine.advance
    engine.advance = lambda *jobs: (time.sleep(0.3), advance(*jobs))
    yield
    engine.advance = advance


def say(page, text: str):
    """The section of an answer, once that is finished."""
    page.fill("textarea", text)
    page.press("textarea", "Enter")
    turn = page.locator("#log section").last
    turn.locator(".controls").wait_for(state="visible")
    return turn


def photograph(page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png")


def text_of(turn) -> str:
    return turn.locator(".answer").evaluate("element => element.textContent").replace("↵\n", "\n").replace("·", "")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_an_answer_is_seen_being_denoised_and_can_be_played_again(server, opened, size):
    page = opened(server, size)
    wanted = alone(server.name, rendered("hi"), max_new_tokens=24, steps=8)
    turn = say(page, "hi")
    assert text_of(turn) == wanted.text and turn.locator(".answer .masked").count() == 0
    assert f"forward {wanted.forwards}/{wanted.forwards}, {wanted.tokens} tokens" in turn.inner_text()

    # The bar goes through the forwards, and the button plays them.
    scrub = turn.locator(".scrub")
    assert scrub.get_attribute("max") == str(wanted.forwards)
    tokens = turn.locator(".answer span").count()
    scrub.evaluate("range => { range.value = 0; range.dispatchEvent(new Event('input')) }")
    assert turn.locator(".answer .masked").count() >= tokens and "forward 0/" in turn.inner_text()
    photograph(page, f"{server.name}-{size['width']}-begin")
    turn.locator(".play").click()
    page.wait_for_function("range => Number(range.value) > 1", arg=scrub.element_handle())
    turn.locator(".play").click()
    paused = scrub.input_value()
    time.sleep(0.7)  # longer than a frame
    assert scrub.input_value() == paused
    photograph(page, f"{server.name}-{size['width']}-middle")

    # The next turn knows the one before it; nothing is wider than the window.
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": wanted.text}]
    ids, _ = tokenizer().render([*chat, {"role": "user", "content": "Add the number."}], reply=True)
    turn = say(page, "Add the number.")
    assert text_of(turn) == alone(server.name, ids, max_new_tokens=24, steps=8).text
    page.click("summary")
    photograph(page, f"{server.name}-{size['width']}-options")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_sliders_are_the_options_of_the_next_answer(server, opened):
    page = opened(server)
    page.click("summary")
    names = page.locator("#options input").evaluate_all("inputs => inputs.map(input => input.id)")
    own = {"mdlm": "block_size", "causal": "speculate"}[server.name]
    assert sorted(names) == sorted(["max_new_tokens", "steps", "threshold", "temperature", own])
    options = {"max_new_tokens": 10} | {"mdlm": {"block_size": 5, "steps": 4}, "causal": {"speculate": 3}}[server.name]
    for name, value in options.items():
        page.evaluate(
            "([name, value]) => { const input = document.getElementById(name); input.value = value;"
            " input.dispatchEvent(new Event('input', {bubbles: true})) }",
            [name, value],
        )
    wanted = alone(server.name, rendered("hi"), **options)
    turn = say(page, "hi")
    assert text_of(turn) == wanted.text and f"/{wanted.forwards}," in turn.inner_text()
    page.click("#anew")
    assert page.locator("#log section").count() == 0


def test_masks_are_filled_in_and_what_is_said_is_no_html(server, opened):
    page = opened(server)
    hostile = (
        "<img src=x onerror=document.title='owned'><|mask|></pre><script>document.title='owned'</script>&amp;<|mask|>"
    )
    turn = say(page, hostile)
    begin, middle, _ = hostile.split("<|mask|>")
    assert text_of(turn).startswith(begin) and middle in text_of(turn)
    assert turn.locator(".said").inner_text() == hostile
    assert turn.locator("img, script").count() == 0 and page.title() != "owned"
    photograph(page, f"{server.name}-infilling")


def test_an_answer_can_be_stopped_and_an_error_is_shown(server, opened):
    page = opened(server)
    with slowed(server.service.engine):
        page.fill("textarea", "hi")
        page.press("textarea", "Enter")
        page.locator(".answer .masked").first.wait_for(state="attached")
        page.click("#send")
        page.locator(".error", has_text="stopped").wait_for()
        end = time.monotonic() + 10
        while server.service.engine.rows():
            assert time.monotonic() < end
    page.fill("textarea", "word " * 300)
    page.press("textarea", "Enter")
    page.locator(".error", has_text="exceed the model's context of 256").wait_for()
    photograph(page, f"{server.name}-error")


def test_a_new_chat_knows_nothing_of_an_answer_that_it_cut_off(server, opened):
    page = opened(server)
    with slowed(server.service.engine):
        page.fill("textarea", "Add the number.")
        page.press("textarea", "Enter")
        page.locator(".answer .settled").first.wait_for(state="attached")
        page.click("#anew")
    assert text_of(say(page, "hi")) == alone(server.name, rendered("hi"), max_new_tokens=24, steps=8).text
