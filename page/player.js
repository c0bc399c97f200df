// Plays the frames of a canvas. A frame is stored as what changed: see `page` in picture.py.
const data = JSON.parse(document.getElementById("data").textContent);
const [title, prompt, canvas, told, play, scrub, count, legend, map, svg] =
  ["#title", "#prompt pre", "#canvas", "#told", "#play", "#scrub", "#count", "#legend", "#map", "#map svg"]
    .map((place) => document.querySelector(place));
const names = Object.fromEntries(data.states.map(([name]) => [name[0], name]));
const texts = [];
const frames = data.frames.map(([count, states, changed]) => {
  Object.assign(texts, changed);
  return { count, canvas: [...states].map((letter, position) => [texts[position], names[letter]]) };
});
const last = frames.length - 1;
const player = playback(play, scrub, last, data.pace, show);

function show(now) {
  drawCanvas(canvas, frames[now].canvas, data.borders);
  canvas.style.minHeight = `${Math.max(canvas.offsetHeight, parseFloat(canvas.style.minHeight) || 0)}px`;
  count.textContent = frames[now].count;
  document.getElementById("here").setAttribute("y", now * rows());
}

// The map: positions across, forwards down, each cell as the token is after that forward. A click goes there.
// A forward takes so many pixels:
function rows() {
  return Math.min(Math.max(280 / frames.length, 2), 14);
}

// Which of n cells of a size have a number, if that needs so much room.
function ticks(n, size, room) {
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((step) => step * size >= room);
  return Array.from({ length: Math.ceil(n / step) }, (_, i) => i * step);
}

function drawMap() {
  const T = frames[0].canvas.length, h = rows(), left = 44, top = 34;
  const w = Math.min(Math.max((map.clientWidth - left - 2) / T, 3), 16);
  const cells = element("g", { transform: `translate(${left} ${top})` });
  svg.setAttribute("width", left + T * w + 2);
  svg.setAttribute("height", top + frames.length * h + 2);
  svg.replaceChildren(cells);
  for (let t = 0; t < T; t++) {
    // A rectangle for each run of forwards in one state.
    for (let from = 0, to; from <= last; from = to) {
      const state = frames[from].canvas[t]?.[1]; // none: the answer ended before it
      for (to = from + 1; to <= last && frames[to].canvas[t]?.[1] === state; ) to++;
      const place = { x: t * w, y: from * h, width: w - (w > 5), height: (to - from) * h };
      if (state) cells.append(element("rect", { ...place, class: state }));
    }
  }
  for (const t of data.borders) {
    const x = t * w - 0.5;
    cells.append(element("line", { x1: x, x2: x, y1: -4, y2: frames.length * h, class: "rule" }));
  }
  for (const t of ticks(T, w, 30)) cells.append(label(t, (t + 0.5) * w, -6, "middle"));
  for (const s of ticks(frames.length, h, 14)) cells.append(label(s, -6, (s + 0.5) * h + 4, "end"));
  cells.append(label("position", 0, -22, "start"), label("forward", -left, -6, "start"));
  cells.append(element("rect", { id: "here", width: T * w, height: h }));
  svg.onclick = (event) => player.go(Math.floor((event.clientY - svg.getBoundingClientRect().top - top) / h));
}

function element(name, attributes) {
  const made = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function label(text, x, y, anchor) {
  const made = element("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

// What is known of a token is told where the pointer is.
function tell(event) {
  const position = [...canvas.children].indexOf(event.target);
  if (position < 0) return;
  const [settled, sure] = [data.settled[position], data.confidence[position]];
  const ever = settled < 0 ? "never settled" : "given";
  const when = settled > 0 ? `settled at forward ${settled}, confidence ${sure.toFixed(3)}` : ever;
  told.textContent = `position ${position}, ${JSON.stringify(data.texts[position]).slice(0, 40)}: ${when}`;
}

document.title = title.textContent = data.title;
prompt.textContent = data.prompt;
drawLegend(legend, data.states);
canvas.addEventListener("pointerover", tell);
addEventListener("resize", () => {
  canvas.style.minHeight = "";
  drawMap();
  player.again();
});
addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: () => player.by(-1), ArrowRight: () => player.by(1) };
  const keys = { ...steps, Home: () => player.go(0), End: () => player.go(last), " ": player.toggle };
  if (!(event.key in keys) || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  keys[event.key]();
});
drawMap();
player.at(0);
if (matchMedia("(prefers-reduced-motion: reduce)").matches) player.go(last);
else player.run(true);
