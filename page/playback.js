// Plays frames 0 to last, which show(n) draws: a button plays and pauses, a range goes through them by hand.
function playback(button, range, last, seconds, show) {
  let now = 0, timer = null;

  function at(frame) {
    now = Math.min(Math.max(frame, 0), last);
    range.value = now;
    show(now);
  }

  function run(on) {
    clearInterval(timer);
    timer = on ? setInterval(() => (now < last ? at(now + 1) : run(false)), 1000 * seconds) : null;
    button.textContent = on ? "❚❚" : now < last ? "▶" : "↻";
  }

  // By hand: whoever goes to a frame wants to stay there.
  function go(frame) {
    at(frame);
    run(false);
  }

  function toggle() {
    const on = timer === null;
    if (on && now === last) at(0);
    run(on);
  }

  range.max = last;
  button.addEventListener("click", toggle);
  range.addEventListener("input", () => go(Number(range.value)));
  return { at, run, go, toggle, by: (steps) => go(now + steps), again: () => at(now) };
}
