// stream_lane.js: one lane of the live stream: numbers, text coloured by surprisal, the cache slot by slot, sparklines.
//
//   makeLane(parent, tooltip, {name, title, series, first()}) -> {root, add(steps), set(about), points, clear(), stop()}
//
// first() are the words of the stream's first tokens. What is kept is bounded: KEPT tokens of text, POINTS_KEPT points of a
// curve (every other one is dropped when there are more). Needs stream_chart.js.

const [KEPT, POINTS_KEPT, RUNNING_MEAN] = [400, 1500, 64];

function makeLane(parent, tooltip, { name, title, series, first }) {
  const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
  const root = make("section", "st-lane");
  root.dataset.lane = name;
  root.style.setProperty("--lane", `var(--sq-series-${series})`);
  const head = make("div", "st-head");
  const heading = make("b", "", title);
  const numbers = make("span", "st-numbers");
  head.append(heading, numbers);
  const text = make("div", "st-text");
  text.dir = "auto";
  text.tabIndex = 0;
  text.setAttribute("aria-label", `${title}: the text, coloured by surprisal`);
  root.append(head, text);
  parent.append(root);

  let [about, every, count] = [{}, 1, 0];
  let points = []; // [position, running perplexity, milliseconds]
  let window_ = [];
  let rate = []; // [milliseconds, tokens] lately
  const slots = makeCanvas(root, { label: `${title}: what the cache holds, slot by slot; a key's position is its slot`, height: 48, draw: drawSlots });
  const sparks = make("div", "st-sparks");
  root.append(sparks);
  const own = (colours) => colours.series[series - 1];
  const speed = makeSpark(sparks, { label: "gets", unit: "tokens/s", colour: own });
  const latency = makeSpark(sparks, { label: "a token takes", unit: "ms", colour: own });
  const memory = makeSpark(sparks, { label: "keys, values", unit: "MB", colour: own });

  // The sinks that have left the window stand in the first slots, the window behind them.
  const layOut = (width) => {
    const cache = about.cache ?? {};
    if (cache.keys === undefined) return null;
    const gone = cache.sinks.filter((at) => at < cache.first);
    const filled = gone.length + cache.last - cache.first + 1;
    const room = Math.max(cache.capacity ?? filled, filled, 1);
    return { cache, gone, filled, room, cell: Math.min(12, (width - 8) / room) };
  };

  function drawSlots(context, width, height, colours) {
    const found = layOut(width);
    if (!found) return;
    const { cache, gone, filled, room, cell } = found;
    context.font = `10px ${colours.font}`;
    context.textBaseline = "top";
    context.fillStyle = colours.faint;
    context.fillRect(4, 2, cell * room, 10);
    const block = (from, to, colour) => {
      context.fillStyle = colour;
      if (cell >= 4) for (let i = from; i < to; i++) context.fillRect(4 + i * cell, 2, cell - 1, 10);
      else context.fillRect(4 + from * cell, 2, (to - from) * cell, 10);
    };
    block(0, gone.length, colours.series[1]);
    block(gone.length, filled, colours.series[0]);
    context.fillStyle = colours.dim;
    context.textAlign = "center";
    for (const slot of linearAxis(0, room - 1).ticks((cell * room) / 70)) {
      if (!Number.isInteger(slot)) continue;
      const at = 4 + (slot + 0.5) * cell;
      context.fillRect(Math.round(at), 13, 1, 3);
      context.textAlign = slot ? "center" : "left";
      context.fillText(String(slot), slot ? at : 2, 18);
    }
    context.textAlign = "left";
    const evicted = Math.max(0, cache.first - gone.length);
    const sinks = gone.length ? `sinks ${spanOf(gone)} · ` : "";
    context.fillText(fitText(context, `${sinks}tokens ${cache.first}–${cache.last} · ${evicted.toLocaleString("en")} evicted`, width - 8), 4, 34);
  }

  const spanOf = (places) => (places.at(-1) - places[0] === places.length - 1 && places.length > 1 ? `${places[0]}–${places.at(-1)}` : places.slice(0, 6).join(", "));
  const wordOf = (place) => [...text.querySelectorAll(".st-token")].find((span) => span.token.position === place)?.token.word ?? first()[place];
  const fateOf = (cache, place) => {
    if (cache.sinks.includes(place)) return "an attention sink, kept for good";
    if (cache.capacity === null) return "nothing leaves this cache";
    const leaves = place - cache.first + 1 + cache.capacity - cache.keys;
    return leaves === 1 ? "leaves with the next token" : `leaves when ${leaves} more tokens have come`;
  };
  slots.canvas.addEventListener("pointermove", (event) => {
    const found = layOut(slots.size().width);
    const slot = found ? Math.floor((event.clientX - slots.canvas.getBoundingClientRect().left - 4) / found.cell) : -1;
    if (!found || slot < 0 || slot >= found.room) return tooltip.hide();
    const { cache, gone, filled } = found;
    if (slot >= filled) return tooltip.show([`slot ${slot}: free`], event.clientX, event.clientY);
    const place = slot < gone.length ? gone[slot] : cache.first + slot - gone.length;
    const word = wordOf(place);
    const lines = [`slot ${slot}: token ${place}${word === undefined ? "" : ` “${word}”`}`, fateOf(cache, place), `position ${slot} inside the cache, ${place} in the text`];
    tooltip.show(lines, event.clientX, event.clientY);
  });
  slots.canvas.cache = () => about.cache; // for tests and benchmarks
  slots.canvas.addEventListener("pointerleave", tooltip.hide);

  const addToken = ([position, word, nll, top, milliseconds]) => {
    const span = make("span", "st-token", word);
    span.style.background = `color-mix(in srgb, var(--sq-series-2) ${Math.round(Math.min(1, nll / 8) * 70)}%, transparent)`;
    span.token = { position, word, nll, top, milliseconds };
    if (!text.hasChildNodes() && position <= first().length) text.append(make("span", "st-given", first().slice(0, position).join(""))); // not predicted
    text.append(span);
    if (word.includes("↵")) text.append(document.createElement("br"));
    window_.push(nll);
    if (window_.length > RUNNING_MEAN) window_.shift();
    count++;
    if (count % every === 0) points.push([position, Math.exp(window_.reduce((a, b) => a + b, 0) / window_.length), milliseconds]);
    if (points.length > POINTS_KEPT) {
      points = points.filter((_, i) => i % 2);
      every *= 2;
    }
  };
  text.addEventListener("pointermove", (event) => {
    const found = event.target.token;
    if (!found) return tooltip.hide();
    const lines = [`${found.position}: “${found.word}”`, `surprisal ${number(found.nll)} nats (p = ${number(Math.exp(-found.nll))}) · ${number(found.milliseconds)} ms`];
    for (const [word, chance] of found.top) lines.push(`${(100 * chance).toFixed(1)} % “${word}”`);
    tooltip.show(lines, event.clientX, event.clientY);
  });
  text.addEventListener("pointerleave", tooltip.hide);

  const clear = () => {
    text.replaceChildren();
    [points, window_, every, count, about, rate] = [[], [], 1, 0, {}, []];
    for (const spark of [speed, latency, memory]) spark.clear();
    numbers.textContent = "";
    slots.redraw();
  };
  const clock = (now) => {
    rate.push([performance.now(), now.count]);
    while (rate.length > 2 && rate.at(-1)[0] - rate[0][0] > 3000) rate.shift();
    const [[t0, n0], [t1, n1]] = [rate[0], rate.at(-1)];
    if (t1 - t0 > 500) speed.add((1000 * (n1 - n0)) / (t1 - t0));
  };
  return {
    root, name, title, clear,
    get points() { return points; },
    get series() { return series; },
    add(steps) {
      const follow = text.scrollHeight - text.scrollTop - text.clientHeight < 30;
      for (const step of steps.slice(-KEPT)) addToken(step);
      count += Math.max(0, steps.length - KEPT);
      let extra = text.querySelectorAll(".st-token").length - KEPT;
      while (extra > 0) {
        if (text.firstChild.token) extra--;
        text.firstChild.remove();
      }
      if (follow) text.scrollTop = text.scrollHeight;
    },
    set(now) {
      about = now;
      clock(now);
      if (now.milliseconds !== null) latency.add(now.milliseconds);
      if (now.cache?.megabytes !== undefined) memory.add(now.cache.megabytes);
      numbers.textContent = now.count ? `${now.count.toLocaleString("en")} tokens · perplexity ${number(now.perplexity)} (last ${RUNNING_MEAN}: ${number(now.running)})${now.ended ? " · end of the text" : ""}` : "";
      slots.redraw();
    },
    restore(all) {
      clear();
      for (const step of all.steps) addToken(step);
      points = all.points.map((point) => [...point]);
      every = Math.max(1, Math.round(all.count / Math.max(1, points.length)));
      count = all.count;
      for (const [, , milliseconds] of points.slice(-SPARKS, -1)) latency.add(milliseconds);
      this.set(all);
      requestAnimationFrame(() => (text.scrollTop = text.scrollHeight)); // lanes that come after it make it narrower
    },
    stop() {
      for (const view of [slots, speed, latency, memory]) view.stop();
      root.remove();
    },
  };
}
