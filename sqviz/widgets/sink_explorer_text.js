// sink_explorer_text.js: the text, token by token: coloured by what it costs more, clicked to become a sink.
//
//   makeSinkText(parent, tooltip, tokens, {toggle(at)}) -> {update({scores, chosen}), stop()}

function nllOf(found) {
  if (!found) return null;
  const text = atob(found.nll);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Float32Array(bytes.buffer);
}

function makeSinkText(parent, tooltip, tokens, { toggle }) {
  const frame = Object.assign(document.createElement("div"), { className: "sx-text" });
  frame.setAttribute("role", "group");
  frame.setAttribute("aria-label", "The text. Arrow keys move between tokens; Enter or Space makes one a sink or takes it away.");
  frame.dir = "auto";
  parent.append(frame);
  const buttons = tokens.map((text, at) => {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "sx-token", textContent: text, tabIndex: at ? -1 : 0 });
    button.dataset.at = at;
    frame.append(button);
    if (text.includes("↵")) frame.append(document.createElement("br"));
    return button;
  });
  let shown = { nll: {}, chosen: new Set() };
  const at = (event) => {
    const button = event.target.closest?.(".sx-token");
    return button ? Number(button.dataset.at) : -1;
  };
  const explain = (place, x, y) => {
    const value = (name) => (place && shown.nll[name] ? `${number(shown.nll[name][place - 1])} nats` : "—");
    const lines = [`${place}: “${tokens[place]}”${shown.chosen.has(place) ? " · a sink" : ""}`];
    if (place) lines.push(`untouched model ${value("dense")}`, `window alone ${value("window")}`, `chosen sinks ${value("sinks")}`);
    else lines.push("the first token is given, not predicted");
    lines.push(shown.chosen.has(place) ? "click: no sink any more" : "click: make it a sink");
    tooltip.show(lines, x, y);
  };
  frame.addEventListener("click", (event) => {
    if (at(event) < 0) return;
    tooltip.hide(); // what it says is about to change
    toggle(at(event));
  });
  frame.addEventListener("pointermove", (event) => (at(event) >= 0 ? explain(at(event), event.clientX, event.clientY) : tooltip.hide()));
  frame.addEventListener("pointerleave", tooltip.hide);
  frame.addEventListener("keydown", (event) => {
    const place = at(event);
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -place, End: tokens.length - 1 - place }[event.key];
    if (place < 0 || by === undefined) return;
    const next = Math.max(0, Math.min(tokens.length - 1, place + by));
    buttons[place].tabIndex = -1;
    buttons[next].tabIndex = 0;
    buttons[next].focus();
    const box = buttons[next].getBoundingClientRect();
    explain(next, box.left, box.bottom);
    event.preventDefault();
  });
  return {
    update({ scores, chosen }) {
      shown = { nll: Object.fromEntries(["dense", "window", "sinks"].map((name) => [name, nllOf(scores[name])])), chosen: new Set(chosen) };
      const { dense, sinks } = shown.nll;
      buttons.forEach((button, place) => {
        const more = place && dense && sinks ? sinks[place - 1] - dense[place - 1] : 0;
        const strength = Math.round(Math.min(1, Math.abs(more) / 4) * 75);
        const name = more > 0 ? "--sq-series-2" : "--sq-series-1";
        button.style.background = strength > 2 ? `color-mix(in srgb, var(${name}) ${strength}%, transparent)` : "";
        button.setAttribute("aria-pressed", shown.chosen.has(place));
      });
      return shown.nll;
    },
  };
}
