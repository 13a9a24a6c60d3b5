// stream_source.js: where the text comes from: the embedded corpus, pasted text, a file, or the model itself after a prompt.
//
//   addSource(root, send)     send(message) tells the kernel: {kind: "source", what: "corpus" | "text" | "prompt", ...}; a
//                             long text goes ahead in pieces, {kind: "piece", text}, for Jupyter's connection ends at a
//                             message of 10 MB

const MOST_OF_A_FILE = 12_000_000; // bytes; the kernel takes fewer characters, and says so
const PIECE = 500_000;

function addSource(root, send) {
  const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
  const sendText = (text, message) => {
    let at = 0;
    while (text.length - at > PIECE) {
      const end = at + PIECE - (text.codePointAt(at + PIECE - 1) > 0xffff); // not through the middle of an emoji
      send({ kind: "piece", text: text.slice(at, end) });
      at = end;
    }
    send({ kind: "source", text: text.slice(at), ...message });
  };
  const details = document.createElement("details");
  details.append(make("summary", "", "Another text"));
  const area = Object.assign(make("textarea", "st-source"), { rows: 4, placeholder: "Paste a text to read, or write a prompt for the model to go on from" });
  area.setAttribute("aria-label", "Text to read, or prompt");
  const reading = make("div", "sqviz-bar");
  addButton(reading, "Read it", "Score this text under every lane", () => sendText(area.value, { what: "text" }));
  addButton(reading, "Embedded text", "Back to the text that sqviz brings along", () => send({ kind: "source", what: "corpus" }));
  const file = Object.assign(document.createElement("input"), { type: "file", accept: ".txt,.md,text/*" });
  file.setAttribute("aria-label", "A text file to read");
  file.addEventListener("change", async () => {
    const chosen = file.files?.[0];
    if (chosen) sendText(await chosen.slice(0, MOST_OF_A_FILE).text(), { what: "text", name: chosen.name });
  });
  reading.append(file);

  const writing = make("div", "sqviz-bar");
  const choice = { do_sample: true, temperature: 1, top_p: 1, top_k: 50, seed: 0 };
  addButton(writing, "Go on from it", "Let the model write, under every lane", () => sendText(area.value, { what: "prompt", ...choice }));
  const random = [];
  addSelect(writing, "next token", [["sample", "drawn at random"], ["greedy", "the most probable"]], "sample", (value) => {
    choice.do_sample = value === "sample";
    for (const input of random) input.disabled = !choice.do_sample;
  });
  const range = (text, title, name, min, max, step) => {
    const field = Object.assign(make("label", "sqviz-field", text), { title });
    const input = Object.assign(document.createElement("input"), { type: "range", min, max, step, value: choice[name] });
    const shown = make("output", "", choice[name]);
    input.addEventListener("input", () => (shown.textContent = choice[name] = Number(input.value)));
    field.append(input, shown);
    writing.append(field);
    random.push(input);
  };
  range("temperature", "Divides the scores: above 1 more daring, below 1 more careful", "temperature", 0.1, 2, 0.1);
  range("top-p", "Only the most probable tokens that have this much probability together", "top_p", 0.05, 1, 0.05);
  const count = (text, title, name, max) => {
    const field = Object.assign(make("label", "sqviz-field", text), { title });
    const input = Object.assign(document.createElement("input"), { type: "number", className: "st-number", min: 0, max, step: 1, value: choice[name] });
    input.addEventListener("change", () => {
      choice[name] = Math.max(0, Math.min(max, Math.round(Number(input.value)) || 0));
      input.value = choice[name];
    });
    field.append(input);
    writing.append(field);
    random.push(input);
  };
  count("top-k", "Only so many of the most probable tokens; 0 for all", "top_k", 100_000);
  count("seed", "Of the draws: the same seed, the same text", "seed", 2 ** 31 - 1);
  details.append(area, reading, writing);
  root.append(details);
}
