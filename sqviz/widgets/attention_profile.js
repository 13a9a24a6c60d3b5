// attention_profile.js: below the heads, what each token gets and how large it is: two strips, a row per layer.
//
//   makeProfile(parent, tooltip, data, {span, setSpan, palette}) -> {canvas, redraw, stop}
//
// Left: share of attention per key, mean over heads; at its edge a bar per layer, the entropy. Right, or below where it is
// narrow: largest |x| of the same tokens behind each layer. Dragging over either picks a span of tokens.

const BARS = 64; // room for the entropies
const STRIP = { left: 46, top: 26, bottom: 58, gap: 40 };

function makeProfile(parent, tooltip, data, { span, setSpan, palette }) {
  const { meta, share, norms, tokens } = data;
  const { layers, length } = meta;
  const shares = logAxis(Math.min(1e-3, 0.1 / length), 1);
  const entropies = Array.from({ length: layers }, (_, layer) => {
    const own = data.panels.filter((panel) => panel.layer === layer);
    return own.reduce((sum, panel) => sum + panel.entropy, 0) / own.length;
  });
  const most = Math.max(...entropies, 1e-6);
  const largest = norms.reduce((most, value) => Math.max(most, value), 1e-6);
  const smallest = norms.reduce((least, value) => (value > 0 ? Math.min(least, value) : least), largest);
  const sizes = logAxis(Math.min(smallest, largest / 10), largest);
  const strips = [
    { name: "share", title: "share of attention that each key gets, mean over heads", values: share, axis: shares, unit: "" },
    { name: "norms", title: "largest |x| of the same tokens behind each layer", values: norms, axis: sizes, unit: "" },
  ];
  const raster = makeRaster();
  const tallOf = () => Math.max(90, Math.min(240, layers * 8));
  let boxes = [];
  let drag = null;

  const place = (width) => {
    const tall = tallOf();
    const beside = width > 760;
    const each = (beside ? (width - 2 * STRIP.left - 12 - BARS) / 2 : width - STRIP.left - 10 - BARS);
    boxes = strips.map((strip, i) => ({
      strip, width: each, height: tall,
      x: STRIP.left + (beside ? i * (each + STRIP.left + BARS) : 0), y: STRIP.top + (beside ? 0 : i * (tall + STRIP.top + STRIP.bottom)),
    }));
    return (beside ? 1 : 2) * (tall + STRIP.top + STRIP.bottom);
  };
  const shown = () => {
    const chosen = span();
    return chosen.length === 2 ? [Math.min(...chosen), Math.max(...chosen) + 1] : [0, length];
  };
  const surface = makeCanvas(parent, {
    label: "Share of attention and size of activations, token by token and layer by layer. Drag to pick a span of tokens.",
    height: place,
    draw(context, width, height, colours) {
      const [from, to] = shown();
      const lut = lutOf(palette());
      for (const box of boxes) drawStrip(context, box, from, to, lut, colours);
    },
  });

  function drawStrip(context, box, from, to, lut, colours) {
    const { strip } = box;
    const columns = Math.max(1, Math.min(to - from, Math.floor(box.width * (window.devicePixelRatio || 1))));
    const image = raster.fit(columns, layers);
    for (let layer = 0; layer < layers; layer++) {
      for (let c = 0; c < columns; c++) {
        const [first, stop] = [from + Math.floor((c * (to - from)) / columns), from + Math.floor(((c + 1) * (to - from)) / columns)];
        let most = 0;
        for (let token = first; token < Math.max(stop, first + 1); token++) most = Math.max(most, strip.values[layer * length + token]);
        image[layer * columns + c] = lut[Math.max(0, Math.min(255, Math.round(255 * strip.axis.at(most))))];
      }
    }
    raster.paint(context, box);
    context.font = `11px ${colours.font}`;
    context.fillStyle = colours.ink;
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillText(strip.title, box.x, box.y - 12);
    context.fillStyle = colours.dim;
    context.textAlign = "right";
    const every = Math.max(1, Math.ceil(14 / (box.height / layers)));
    for (let layer = 0; layer < layers; layer += every) context.fillText(String(layer), box.x - 5, box.y + ((layer + 0.5) * box.height) / layers);
    context.save();
    context.translate(box.x - 32, box.y + box.height / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText("layer", 0, 0);
    context.restore();
    drawTokens(context, box, from, to, colours);
    if (strip.name === "share") drawEntropies(context, box, colours);
    const bar = { x: box.x + box.width * 0.45, y: box.y + box.height + 36, width: box.width * 0.5, height: 7 };
    drawColourBar(context, bar, strip.axis, lut, strip.name === "share" ? "share" : "largest |x|", colours, { below: strip.name === "share" });
  }

  function drawEntropies(context, box, colours) {
    const [x, each] = [box.x + box.width + 5, box.height / layers];
    context.fillStyle = colours.series[0];
    entropies.forEach((value, layer) => context.fillRect(x, box.y + layer * each + 0.5, (value / most) * (BARS - 18), Math.max(1, each - 1)));
    context.fillStyle = colours.dim;
    context.textAlign = "left";
    context.fillText("entropy", x, box.y - 12);
    context.fillText(`${number(most)} nats`, x, box.y + box.height + 10);
  }

  function drawTokens(context, box, from, to, colours) {
    const each = box.width / (to - from);
    const words = tokens[from] !== `token ${from}` && each > 26;
    context.textAlign = "center";
    context.fillStyle = colours.dim;
    const round = linearAxis(from, to - 1).ticks(box.width / 60).filter(Number.isInteger);
    for (const token of words ? Array.from({ length: to - from }, (_, i) => from + i) : round) {
      const text = words ? clipped(context, tokens[token], each - 3) : String(token);
      context.fillText(text, box.x + (token - from + 0.5) * each, box.y + box.height + 10);
    }
    if (!words) {
      context.textAlign = "left";
      context.fillText("token", box.x, box.y + box.height + 24);
    }
  }

  const clipped = (context, text, room) => {
    if (context.measureText(text).width <= room) return text;
    let end = text.length;
    while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > room) end--;
    return `${text.slice(0, end)}…`;
  };

  const { canvas } = surface;
  canvas.strips = () => boxes.map(({ strip, x, y, width, height }) => ({ name: strip.name, x, y, width, height })); // for tests
  const under = (event) => {
    const frame = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    const box = boxes.find((one) => x >= one.x && x < one.x + one.width && y >= one.y && y < one.y + one.height);
    if (!box) return null;
    const [from, to] = shown();
    return { box, token: from + Math.min(to - from - 1, Math.floor(((x - box.x) / box.width) * (to - from))), layer: Math.min(layers - 1, Math.floor(((y - box.y) / box.height) * layers)) };
  };
  canvas.addEventListener("pointerdown", (event) => {
    const found = under(event);
    if (!found) return;
    drag = { from: found.token, to: found.token };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const found = under(event);
    canvas.style.cursor = found ? "col-resize" : "";
    if (drag && found) drag.to = found.token;
    if (!found) return tooltip.hide();
    const at = found.layer * length + found.token;
    const lines = [
      `layer ${found.layer} · ${tokenName([found.token, found.token], tokens)}`,
      `gets ${number(100 * share[at])} % of the attention (mean over heads); entropy here ${number(entropies[found.layer])} nats`,
      `largest |x| ${number(norms[at])}`,
    ];
    if (drag) lines.push(`release to show tokens ${Math.min(drag.from, drag.to)}–${Math.max(drag.from, drag.to)}`);
    tooltip.show(lines, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerup", () => {
    if (drag && Math.abs(drag.to - drag.from) >= 1) setSpan([Math.min(drag.from, drag.to), Math.max(drag.from, drag.to)]);
    drag = null;
  });
  canvas.addEventListener("pointerleave", () => !drag && tooltip.hide());
  canvas.addEventListener("dblclick", () => setSpan([]));
  canvas.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    setSpan([]);
    event.preventDefault();
  });
  zoomByHand(canvas, { tokenAt: (event) => under(event)?.token ?? null, span, setSpan, length });
  return surface;
}
