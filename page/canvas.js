// Draws a canvas into an element, a span for each token. tokens: [text, state] each. Text is never read as HTML.
function drawCanvas(element, tokens, borders = []) {
  const blocks = new Set(borders);
  element.replaceChildren(...tokens.map(([text, state], position) => {
    const span = document.createElement("span");
    span.textContent = text;
    span.className = blocks.has(position) ? `${state} border` : state;
    return span;
  }));
}

// What the states' colours mean. states: [name, meaning] each.
function drawLegend(element, states) {
  element.replaceChildren(...states.map(([name, meaning]) => {
    const item = document.createElement("li");
    item.className = name;
    item.textContent = meaning;
    return item;
  }));
}
