// stream_lane.js: one lane of the live stream: numbers, text coloured by surprisal, the cache slot by slot, sparklines.
//
//   makeLane(parent, tooltip, {name, title, series}) -> {root, add(steps), set(about), points, clear(), stop()}
//
// What is kept is bounded: KEPT tokens of text, POINTS points of a curve (every other one is dropped when there are more).

const [KEPT, POINTS_KEPT, RUNNING_MEAN, SPARKS] = [400, 1500, 64, 120];

function makeLane(parent, tooltip, { name, title, series }) {
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
  const sparks = { speed: [], memory: [] };
  const cacheView = makeCanvas(root, { label: `${title}: what the cache holds`, height: 34, draw: drawCache });
  const sparkView = makeCanvas(root, { label: `${title}: milliseconds per token and memory of keys and values`, height: 42, draw: drawSparks });

  function drawCache(context, width, height, colours) {
    const cache = about.cache ?? {};
    if (cache.keys === undefined) return;
    const gone = cache.sinks.filter((at) => at < cache.first);
    const slots = gone.length + cache.last - cache.first + 1;
    const room = cache.capacity ?? slots;
    const cell = Math.min(12, (width - 8) / Math.max(room, 1));
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
    block(gone.length, slots, colours.series[0]);
    context.fillStyle = colours.dim;
    context.textAlign = "left";
    const evicted = Math.max(0, cache.first - gone.length);
    const sinks = gone.length ? `sinks: tokens ${spanOf(gone)} in slots 0–${gone.length - 1} · ` : "";
    context.fillText(fit(context, `${sinks}tokens ${cache.first}–${cache.last} in slots ${gone.length}–${slots - 1} · ${evicted} evicted`, width - 8), 4, 18);
  }

  const spanOf = (places) => (places.at(-1) - places[0] === places.length - 1 && places.length > 1 ? `${places[0]}–${places.at(-1)}` : places.slice(0, 6).join(", "));
  const fit = (context, words, room) => {
    if (context.measureText(words).width <= room) return words;
    let end = words.length;
    while (end > 1 && context.measureText(`${words.slice(0, end)}…`).width > room) end--;
    return `${words.slice(0, end)}…`;
  };

  function drawSparks(context, width, height, colours) {
    const half = (width - 20) / 2;
    const draw = (values, x, label, unit) => {
      context.font = `10px ${colours.font}`;
      context.textBaseline = "top";
      context.textAlign = "left";
      context.fillStyle = colours.dim;
      const last = values.at(-1);
      context.fillText(fit(context, last === undefined ? label : `${label} ${number(last)} ${unit}`, half), x, 0);
      if (values.length < 2) return;
      const top = Math.max(...values) * 1.05 || 1;
      context.strokeStyle = colours.series[series - 1];
      context.lineWidth = 1.5;
      context.beginPath();
      values.forEach((value, i) => {
        const [px, py] = [x + (i / (SPARKS - 1)) * half, height - 2 - (value / top) * (height - 18)];
        i ? context.lineTo(px, py) : context.moveTo(px, py);
      });
      context.stroke();
    };
    draw(sparks.speed, 4, "per token", "ms");
    draw(sparks.memory, 16 + half, "keys and values", "MB");
  }

  const addToken = ([position, word, nll, top, milliseconds]) => {
    const span = make("span", "st-token", word);
    span.style.background = `color-mix(in srgb, var(--sq-series-2) ${Math.round(Math.min(1, nll / 8) * 70)}%, transparent)`;
    span.token = { position, word, nll, top, milliseconds };
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
    [points, window_, every, count, about] = [[], [], 1, 0, {}];
    sparks.speed.length = sparks.memory.length = 0;
    numbers.textContent = "";
    for (const view of [cacheView, sparkView]) view.redraw();
  };
  return {
    root, name, clear,
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
      if (now.milliseconds !== null) sparks.speed.push(now.milliseconds);
      if (now.cache?.megabytes !== undefined) sparks.memory.push(now.cache.megabytes);
      for (const values of Object.values(sparks)) if (values.length > SPARKS) values.shift();
      numbers.textContent = now.count ? `${now.count.toLocaleString("en")} tokens · perplexity ${number(now.perplexity)} (last ${RUNNING_MEAN}: ${number(now.running)}) · ${number(1000 / now.milliseconds)} tokens/s${now.ended ? " · end of the text" : ""}` : "";
      for (const view of [cacheView, sparkView]) view.redraw();
    },
    restore(all) {
      clear();
      for (const step of all.steps) addToken(step);
      points = all.points.map((point) => [...point]);
      every = Math.max(1, Math.round(all.count / Math.max(1, points.length)));
      count = all.count;
      text.scrollTop = text.scrollHeight;
      this.set(all);
    },
    stop() {
      cacheView.stop();
      sparkView.stop();
      root.remove();
    },
  };
}
