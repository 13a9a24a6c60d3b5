// stream_chart.js: perplexity against position, one curve per lane, and the memory of the kernel's process beside it.
//
//   makeStreamChart(parent, lanes, trained()) -> {canvas, redraw, stop}     lanes: iterable of makeLane(...), see stream_lane.js
//   makeSpark(parent, {label, unit, colour}) -> {add(value), clear(), stop()}   a small curve of the latest SPARKS values

const SPARKS = 120;
const DASH = { dense: [], window: [2, 3], sinks: [7, 3], recompute: [9, 3, 2, 3] };

function fitText(context, words, room) {
  if (context.measureText(words).width <= room) return words;
  let end = words.length;
  while (end > 1 && context.measureText(`${words.slice(0, end)}…`).width > room) end--;
  return `${words.slice(0, end)}…`;
}

function makeStreamChart(parent, lanes, trained) {
  const chart = makeCanvas(parent, {
    label: "Perplexity of the latest 64 tokens against position, one curve per lane",
    height: 260,
    draw(context, width, height, colours) {
      const box = { x: 58, y: 26, width: width - 76, height: height - 72 };
      const shown = [...lanes()].filter((lane) => lane.points.length);
      const longest = Math.max(100, ...shown.map((lane) => lane.points.at(-1)[0]));
      const [x, y] = [linearAxis(0, longest * 1.02), rangeOf(shown, longest)];
      const { px, py } = drawAxes(context, box, x, y, { xLabel: "tokens read", yLabel: "perplexity, last 64" }, colours);
      drawNames(context, box, shown, colours);
      context.save();
      context.beginPath();
      context.rect(box.x, box.y, box.width, box.height);
      context.clip();
      if (trained() && trained() <= longest) drawMark(context, box, px(trained()), "trained context ends", colours);
      for (const lane of shown) {
        stroke(context, lane, colours);
        context.beginPath();
        lane.points.forEach(([position, value], i) => (i ? context.lineTo(px(position), py(value)) : context.moveTo(px(position), py(value))));
        context.stroke();
      }
      context.restore();
    },
  });

  // The first tokens, of which a mean says little, do not stretch the axis.
  function rangeOf(shown, longest) {
    let [lo, hi] = [Infinity, 0];
    for (const lane of shown) {
      for (const [position, value] of lane.points) {
        if (position < Math.min(48, longest / 2)) continue;
        lo = Math.min(lo, value);
        hi = Math.max(hi, value);
      }
    }
    if (!Number.isFinite(lo)) return logAxis(1, 1000);
    return logAxis(lo / 1.15, Math.max(hi, lo * 3) * 1.15);
  }

  function stroke(context, lane, colours) {
    context.strokeStyle = colours.series[lane.series - 1];
    context.setLineDash(DASH[lane.name]);
    context.lineWidth = 2;
  }

  function drawNames(context, box, shown, colours) {
    let at = box.x;
    context.textAlign = "left";
    context.textBaseline = "middle";
    for (const lane of shown) {
      stroke(context, lane, colours);
      context.beginPath();
      context.moveTo(at, 11);
      context.lineTo(at + 26, 11);
      context.stroke();
      context.fillStyle = colours.ink;
      context.fillText(lane.title, at + 31, 11);
      at += 31 + context.measureText(lane.title).width + 18;
    }
    context.setLineDash([]);
  }

  function drawMark(context, box, at, text, colours) {
    context.strokeStyle = colours.dim;
    context.setLineDash([3, 3]);
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(at, box.y);
    context.lineTo(at, box.y + box.height);
    context.stroke();
    context.fillStyle = colours.dim;
    const left = at + 8 + context.measureText(text).width > box.x + box.width; // no room on its right
    context.textAlign = left ? "right" : "left";
    context.textBaseline = "top";
    context.fillText(text, at + (left ? -4 : 4), box.y + 2);
  }
  return chart;
}

function makeSpark(parent, { label, unit, colour }) {
  const values = [];
  const view = makeCanvas(parent, {
    label: `${label} in ${unit}, lately`, height: 40,
    draw(context, width, height, colours) {
      context.font = `10px ${colours.font}`;
      context.textBaseline = "top";
      context.textAlign = "left";
      context.fillStyle = colours.dim;
      if (!values.length) return;
      context.fillText(fitText(context, `${label} ${number(values.at(-1))} ${unit}`, width - 4), 2, 0);
      if (values.length < 2) return;
      const top = Math.max(...values) * 1.05 || 1;
      context.strokeStyle = colour(colours);
      context.lineWidth = 1.5;
      context.beginPath();
      values.forEach((value, i) => {
        const [px, py] = [2 + (i / (SPARKS - 1)) * (width - 4), height - 2 - (value / top) * (height - 18)];
        i ? context.lineTo(px, py) : context.moveTo(px, py);
      });
      context.stroke();
    },
  });
  view.canvas.values = values; // for tests
  return {
    stop: view.stop,
    add(value) {
      values.push(value);
      if (values.length > SPARKS) values.shift();
      view.redraw();
    },
    clear() {
      values.length = 0;
      view.redraw();
    },
  };
}
