// The channel side of the smoothing explorer: |X/s|, the channel maxima and |s·W|, one above the other over one channel
// axis. A cell's colour is the integer it becomes under the present scheme (its size in quantisation steps, log scale), and
// blank is 0: the maps show what the integers hold. Not quantised: its size next to the largest, over three decades.

const CHANNEL_SIDE = { left: 52, right: 12 };
const COLOUR_DECADES = 3; // where nothing is quantised
const COUNTED_CELLS = 600_000; // up to so many, what rounds to 0 is counted in every cell, not only in those shown

const groupSize = (word) => Number(/^per-group\((\d+)\)$/.exec(word)?.[1] ?? 0);

// From the largest value that shares a step down to half that step, in codes.
const halfStep = ({ word, bits }, range) => (word === "none" ? COLOUR_DECADES : Math.log10(2 * (2 ** (bits - 1) - 1))) * codesPerDecade(range);

// The ground of shifted cells under a granularity, see `paintCells`. `word`: tensor, row, column, per-group(n) or none.
function groundOf({ word, bits }, range, cells, rows, columns, rowMax, channelOf) {
  const below = halfStep({ word, bits }, range);
  if (word === "row") return { top: rowMax, stride: 1, part: null, below };
  const size = groupSize(word);
  if (!size && word !== "column") return { top: Int16Array.of(Math.max(...rowMax)), stride: 0, part: null, below };
  const part = size ? Int32Array.from(channelOf, (j) => Math.floor(j / size)) : Int32Array.from({ length: columns }, (_, p) => p);
  const width = part.reduce((most, value) => Math.max(most, value), 0) + 1;
  const top = new Int16Array(size ? rows * width : width).fill(LEAST);
  for (let r = 0, i = 0; r < rows; r++) {
    const base = size ? r * width : 0;
    for (let p = 0; p < columns; p++, i++) if (cells[i] > top[base + part[p]]) top[base + part[p]] = cells[i];
  }
  return { top, stride: size ? width : 0, part, below };
}

// Codes at a resolution of at most so many rows, pooled when they change.
function makePooled() {
  let [pooled, source, wanted] = [null, null, 0];
  return (data, channels, most) => {
    if (source !== data.codes || wanted !== most) {
      pooled = poolRows(data.codes, data.rows, channels, most);
      pooled.tallest = tallest(pooled.codes, pooled.rows, channels);
      [source, wanted] = [data.codes, most];
    }
    return pooled;
  };
}

// Pooled codes after scaling, and the ground that the scheme gives them, in at most so many columns.
function makeCells() {
  let [cells, rowMax] = [new Int16Array(0), new Int16Array(0)];
  return (data, pooled, channels, order, shifts, most, rounding) => {
    const columns = Math.min(channels, most), { rows } = pooled;
    if (cells.length !== rows * columns) cells = new Int16Array(rows * columns);
    if (rowMax.length !== rows) rowMax = new Int16Array(rows);
    shiftCells(pooled.codes, rows, channels, shifts, columns, cells, rowMax);
    const channelOf = groupSize(rounding.word) ? Int32Array.from({ length: columns }, (_, p) => order[Math.floor(((p + 0.5) * channels) / columns)]) : null;
    const ground = rounding.fixed ?? groundOf(rounding, data.range, cells, rows, columns, rowMax, channelOf);
    return { cells, rows, columns, ground };
  };
}

// One map: codes [row][channel] in, a raster of at most `rows` × `columns` cells out.
function makeMap() {
  const raster = makeRaster(), pool = makePooled(), shown = makeCells(), whole = makeCells();
  let [shades, shadesFor] = [null, ""];
  return {
    raster,
    // Paints; returns {columns, rows, lost: share of cells that round to 0, exact: counted in all cells, not in those shown}.
    shade(data, channels, order, shifts, limit, rounding, colours) {
      const pooled = pool(data, channels, limit.rows), columns = Math.min(channels, limit.columns), { rows } = pooled;
      const below = halfStep(rounding, data.range), nothing = rounding.word === "none" ? colours.lut[0] : colours.lost;
      const wanted = `${below}|${nothing}`;
      if (wanted !== shadesFor) [shades, shadesFor] = [shadesOf(below, colours.lut, nothing), wanted];
      const out = raster.fit(columns, rows), shared = rounding.word === "tensor" || rounding.word === "none";
      let count = 0, total = rows * columns;
      if (shared && columns === channels) {
        const top = rounding.fixed?.top[0] ?? topOf(pooled.tallest, shifts);
        count = paintCodes(pooled.codes, rows, channels, shifts, top, below, shades, out);
      } else {
        const { cells, ground } = shown(data, pooled, channels, order, shifts, columns, rounding);
        count = paintCells(cells, rows, columns, ground, shades, out);
      }
      const all = data.rows * channels, exact = total === all || all <= COUNTED_CELLS;
      if (exact && total < all) { // the share must not depend on how wide the window is
        const every = whole(data, data, channels, order, shifts, channels, rounding);
        [count, total] = [countLost(every.cells, every.rows, channels, every.ground), all];
      }
      return { columns, rows, lost: count / total, exact };
    },
  };
}

const lostColour = (theme) => (theme.dark ? "#242424" : "#eeeeee");
const cssPixel = (colour) => {
  const probe = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  probe.fillStyle = colour;
  probe.fillRect(0, 0, 1, 1);
  return new Uint32Array(probe.getImageData(0, 0, 1, 1).data.buffer)[0];
};

// The colours of a map, from 0 to the largest integer.
function makeLegend(lut) {
  const frame = element("span", "sm-legend"), zero = element("span", "sm-zero"), bar = Object.assign(document.createElement("canvas"), { width: 256, height: 1 });
  const [least, most] = [element("span", ""), element("span", "")];
  const image = bar.getContext("2d").createImageData(256, 1);
  new Uint32Array(image.data.buffer).set(lut);
  bar.getContext("2d").putImageData(image, 0, 0);
  bar.setAttribute("aria-hidden", "true");
  frame.append(zero, least, bar, most);
  return {
    frame,
    update({ word, bits }, theme) {
      zero.style.background = lostColour(theme);
      zero.hidden = word === "none";
      const top = 2 ** (bits - 1) - 1;
      const texts = word === "none" ? ["1/1000", "largest"] : ["0   1", `${top}`];
      [least, most].forEach((node, i) => setText(node, texts[i]));
      frame.title = word === "none" ? "Size next to the largest, log scale" : `The integer a cell becomes, 0 to ${top}, log scale; the largest of what shares the cell`;
    },
  };
}

function heading(parent, title) {
  const line = Object.assign(document.createElement("div"), { className: "sm-heading" });
  const name = Object.assign(document.createElement("span"), { className: "sm-name" });
  name.append(...title);
  const facts = Object.assign(document.createElement("span"), { className: "sm-facts" });
  line.append(name, facts);
  parent.append(line);
  return facts;
}

const swatch = (text, series, faint = false) => {
  const item = Object.assign(document.createElement("span"), { className: faint ? "sm-key sm-faint" : "sm-key", textContent: text });
  item.style.setProperty("--key", `var(--sq-series-${series})`);
  return item;
};

const before = (was, is) => (was === is ? is : `${was} → ${is}`);
const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);

// |X/s| or |s·W|: `side` says which.
function makeMapPanel(parent, store, side) {
  const isX = side === "x";
  const facts = heading(parent, isX ? ["|X / s|", " activations in"] : ["|s · W|", " weights"]);
  const map = makeMap(), reference = makeMap();
  const lut = lutOf("viridis"), legend = makeLegend(lut);
  facts.before(legend.frame);
  let [shifts, colours, untouched] = [new Int16Array(0), null, {}];

  const rounding = (now) => {
    const { activation, weight, bits, weight_bits: weightBits } = store.scheme;
    if (!isX) return { word: { "per-tensor": "tensor", "per-channel": "row" }[weight] ?? weight, bits: weightBits };
    const word = { "per-tensor": "tensor", "per-token": "row", "per-channel": "column" }[activation] ?? activation;
    if (!store.scheme.static || activation !== "per-tensor") return { word, bits };
    // Static: the step comes from the calibration maxima, not from the tokens shown.
    const { range } = now.pack.x, most = now.xAfter.reduce((a, b) => Math.max(a, b), 0);
    const top = Int16Array.of(most > 0 ? Math.round(codeOf(most, range)) : LEAST);
    return { word, bits, fixed: { top, stride: 0, part: null, below: halfStep({ word, bits }, range) } };
  };
  const lost = (now, data, limit) => {
    // What rounds to 0 without smoothing, computed once per linear, scheme and size.
    const key = `${now.pack.group}|${store.linear}|${schemeKey(store.scheme)}|${limit.columns}|${limit.rows}|${now.pack.sorted}`;
    if (untouched.key !== key || untouched.pack !== now.pack) {
      const plain = { ...now, xAfter: now.pack.x.absmax };
      const none = new Int16Array(now.pack.channels);
      const { lost: share } = reference.shade(data, now.pack.channels, now.pack.order, none, limit, rounding(plain), colours);
      untouched = { key, pack: now.pack, share };
    }
    return untouched.share;
  };

  const panel = makeCanvas(parent, {
    height: () => (isX ? panel.tall ?? store.about.map_height : 132),
    label: isX ? "Map of |X/s|: tokens down, channels across" : "Map of |s·W|: outputs down, channels across",
    draw(context, width, height, theme) {
      const now = store.now();
      const box = { x: CHANNEL_SIDE.left, y: 4, width: width - CHANNEL_SIDE.left - CHANNEL_SIDE.right, height: height - (isX ? 8 : 42) };
      panel.box = box;
      if (!now) return;
      if (colours?.theme !== theme) colours = { theme, lut, lost: cssPixel(lostColour(theme)) };
      const data = isX ? now.pack.x : now.w, way = rounding(now), ratio = window.devicePixelRatio || 1;
      const limit = { columns: Math.max(1, Math.round(box.width * ratio)), rows: Math.max(1, Math.round(box.height * ratio)) };
      if (shifts.length !== now.s.length) shifts = new Int16Array(now.s.length);
      codeShifts(now.s, data.range, isX ? -1 : 1, shifts);
      const was = lost(now, data, limit);
      panel.write = () => legend.update(way, theme);
      store.later();
      if (data.rows === 0) return drawMissing(context, box, theme, store.live);
      const drawn = map.shade(data, now.pack.channels, now.pack.order, shifts, limit, way, colours);
      map.raster.paint(context, box);
      panel.drawn = drawn;
      const most = (values) => number(values.reduce((a, b) => Math.max(a, b), 0));
      const [from, to] = isX ? [now.pack.x.absmax, now.xAfter] : [now.w.absmax, now.wAfter];
      const text = `largest ${before(most(from), most(to))}${way.word === "none" ? "" : `  ·  rounds to 0: ${drawn.exact ? "" : "≈ "}${before(percent(was), percent(drawn.lost))}`}`;
      const counted = `Counted in the cells of this map, each the largest of ${isX ? `${now.pack.tokensPerRow} token(s)` : `${Math.ceil(data.out / data.rows)} output(s)`}`;
      panel.write = () => {
        legend.update(way, theme);
        setText(facts, text);
        if (facts.title !== counted) facts.title = counted;
      };
      Object.assign(panel.canvas.dataset, { cells: `${drawn.columns}x${drawn.rows}`, drawn: `${store.linear} ${store.alpha}` });
      drawMapAxes(context, box, theme, { isX, channels: now.pack.channels, rows: isX ? data.rows * now.pack.tokensPerRow : data.out, sorted: store.sorted });
    },
  });
  return panel;
}

function drawMissing(context, box, theme, live) {
  context.font = `12px ${theme.font}`;
  context.fillStyle = theme.dim;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(live ? "measuring the token map, which this capture was saved without" : "this capture was saved without token maps", box.x + box.width / 2, box.y + box.height / 2);
}

function drawMapAxes(context, box, theme, { isX, channels, rows, sorted }) {
  context.font = `11px ${theme.font}`;
  context.fillStyle = context.strokeStyle = theme.dim;
  context.textAlign = "right";
  context.textBaseline = "middle";
  const y = linearAxis(0, rows);
  for (const tick of y.ticks(box.height / 55)) context.fillText(number(tick), box.x - 6, Math.min(box.y + box.height - 4, Math.max(box.y + 5, box.y + box.height * y.at(tick))));
  context.save();
  context.translate(9, box.y + box.height / 2);
  context.rotate(-Math.PI / 2);
  context.textAlign = "center";
  context.fillText(isX ? "token" : "output", 0, 0);
  context.restore();
  if (isX) return;
  const x = linearAxis(0, channels), bottom = box.y + box.height;
  context.textAlign = "center";
  context.textBaseline = "top";
  for (const tick of x.ticks(box.width / 80)) {
    const at = box.x + box.width * x.at(tick);
    context.fillRect(Math.round(at), bottom, 1, 4);
    context.fillText(number(tick), Math.min(at, box.x + box.width - 8), bottom + 6);
  }
  context.fillText(sorted ? "input channel, largest |X| first" : "input channel", box.x + box.width / 2, bottom + 21);
}
