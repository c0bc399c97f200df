// A chat with the server that this page is from. An answer is drawn after each forward, and can then be played again.
const data = JSON.parse(document.getElementById("data").textContent);
const [title, log, options, hint, legend, form, text, send, anew, turn] =
  ["title", "log", "options", "hint", "legend", "form", "text", "send", "anew", "turn"]
    .map((id) => document.getElementById(id));
let messages = []; // the turns so far
let stopping = null; // of the answer on its way: what stops it

// ---------------------------------------------------------------------------------------------------------------------
// Options: a slider each, for those that the model has. Some have a word for their left end, which leaves the option out.

const SLIDERS = {
  max_new_tokens: { label: "tokens", min: 1, max: 512, step: 1 },
  steps: { label: "steps", min: 1, max: 512, step: 1 },
  threshold: { label: "threshold", min: 0, max: 0.99, step: 0.01, off: "off" },
  block_size: { label: "block", min: 0, max: 128, step: 1, off: "default" },
  temperature: { label: "temperature", min: 0, max: 2, step: 0.05 },
  speculate: { label: "speculation", min: 0, max: 16, step: 1, off: "off" },
};
const sliders = Object.entries(data.options).map(([name, value]) => {
  const { label, off, ...range } = SLIDERS[name];
  const [row, input, output] = ["label", "input", "output"].map((tag) => document.createElement(tag));
  Object.assign(input, { type: "range", id: name, ...range, max: Math.max(range.max, value), value: value ?? range.min });
  const read = () => (off && input.valueAsNumber === range.min ? null : input.valueAsNumber);
  row.append(label, input, output);
  options.append(row);
  return { name, row, read, show: () => (output.textContent = read() ?? off) };
});

function showOptions() {
  const value = Object.fromEntries(sliders.map(({ name, read }) => [name, read()]));
  for (const { name, row, show } of sliders) {
    show();
    // Speculation decodes token after token; a threshold says how many tokens a step reveals.
    const by = value.speculate ? ["steps", "block_size", "threshold"] : value.threshold ? ["steps"] : [];
    row.classList.toggle("idle", by.includes(name));
  }
}

function asked() {
  const idle = (row) => row.classList.contains("idle");
  return Object.fromEntries(sliders.map(({ name, row, read }) => [name, idle(row) ? null : read()]));
}

// ---------------------------------------------------------------------------------------------------------------------
// Answers

// The events of a request, as objects; an Error with the server's words where it is refused or fails.
async function* events(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (response.status === 401) {
    const given = prompt("The server asks for its key:");
    if (given) {
      sessionStorage.setItem("key", given);
      return yield* events(path, body, signal);
    }
  }
  if (!response.ok) throw new Error((await response.json()).error.message);
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
  throw new Error("the server is gone");
}

function told({ forwards, tokens }, total) {
  const share = forwards ? `, ${(tokens / forwards).toFixed(2)} tokens per forward` : "";
  return `forward ${forwards}${total ? `/${total}` : ""}, ${tokens} tokens${share}`;
}

// Changes the page and stays at its end, unless the reader has scrolled up.
function following(change) {
  const down = innerHeight + scrollY >= document.body.scrollHeight - 40;
  change();
  if (down) scrollTo(0, document.body.scrollHeight);
}

// Draws an answer while it is denoised; its text, and whether it came to its end.
async function answer(path, body, turn, signal) {
  const [canvas, controls, play, scrub, count] =
    [".answer", ".controls", ".play", ".scrub", ".count"].map((place) => turn.querySelector(place));
  const frames = [];
  let said = "", failed = null;
  try {
    for await (const { choices: [choice] } of events(path, body, signal)) {
      said += choice.delta?.content ?? choice.text;
      frames.push(choice.canvas);
      following(() => {
        drawCanvas(canvas, choice.canvas.spans);
        count.textContent = told(choice.canvas);
      });
    }
  } catch (error) {
    failed = signal.aborted ? "stopped" : error.message;
  }
  if (frames.length) {
    // A mask is as wide as the text that takes its place, so that nothing moves when it settles.
    const last = frames.at(-1), total = last.forwards;
    const known = ([text, state], t) => [state === "masked" && last.spans[t] ? last.spans[t][0] : text, state];
    playback(play, scrub, frames.length - 1, Math.min(Math.max(8 / frames.length, 0.06), 0.5), (n) => {
      drawCanvas(canvas, frames[n].spans.map(known));
      canvas.style.minHeight = `${Math.max(canvas.offsetHeight, parseFloat(canvas.style.minHeight) || 0)}px`;
      count.textContent = told(frames[n], total);
    }).go(frames.length - 1);
    following(() => (controls.hidden = false));
  }
  if (failed) {
    const note = document.createElement("p");
    note.className = "error";
    note.textContent = failed;
    following(() => turn.append(note));
  }
  return [said, failed === null || (failed === "stopped" && said !== "")];
}

async function say(said) {
  const shown = document.createElement("section");
  shown.append(turn.content.cloneNode(true));
  shown.querySelector(".said").textContent = said;
  log.append(shown);
  scrollTo(0, document.body.scrollHeight);

  // A text with masks is filled in, outside of the conversation; without a template it is continued.
  const infilling = said.includes(data.mask), chat = data.chat && !infilling;
  const turns = [...messages, { role: "user", content: said }];
  const body = { ...asked(), stream: true, canvas: true, ...(chat ? { messages: turns } : { prompt: said }) };
  if (infilling) Object.assign(body, { max_new_tokens: null, speculate: null });
  stopping = new AbortController();
  send.textContent = "stop";
  const [text, good] = await answer(chat ? "v1/chat/completions" : "v1/completions", body, shown, stopping.signal);
  stopping = null;
  send.textContent = "send";
  if (chat && good && shown.isConnected) messages = [...turns, { role: "assistant", content: text }];
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (stopping) return stopping.abort();
  if (!text.value.trim()) return;
  say(text.value);
  text.value = "";
});
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!stopping) form.requestSubmit();
});
anew.addEventListener("click", () => {
  stopping?.abort();
  messages = [];
  log.replaceChildren();
  text.focus();
});
options.addEventListener("input", showOptions);
document.title = title.textContent = data.title;
hint.textContent = `Each ${data.mask} in a message is one token to fill in.`;
drawLegend(legend, data.states);
showOptions();
