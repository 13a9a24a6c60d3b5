// What the smoothing explorer knows: the state the user sets (α, linear, scheme), the packs of arrays, the sweeps and the
// answers of the kernel. Draws nothing. The page's α is the user's hand; the model's follows it, as fast as it can.

const KEEP_PACKS = 24; // groups kept ready in the page
const KEEP_ANSWERS = 9; // values where the hand has rested, shown as dots, per linear and scheme
const KEEP_TIMINGS = 2000;

const setText = (node, text) => node.textContent !== text && (node.textContent = text); // an equal text costs a layout too
const schemeKey = (s) => [s.activation, s.weight, s.static, s.bits, s.weight_bits, s.symmetric].join("|");

// A pack made ready to draw: logarithms taken, columns in the order wanted, the weight maps by linear name.
function preparePack(pack, sorted) {
  const order = Int32Array.from({ length: pack.channels }, (_, j) => j);
  if (sorted) order.sort((a, b) => pack.x_absmax[b] - pack.x_absmax[a]);
  const arrange = (values) => Float32Array.from(order, (j) => values[j]);
  const cells = (codes, rows) => (sorted ? permuteColumns(codes, rows, order) : codes);
  const xAbsmax = arrange(pack.x_absmax);
  const weights = new Map();
  pack.consumers.forEach((consumer, i) => {
    const absmax = arrange(pack[`w_absmax_${i}`]);
    weights.set(consumer.name, { absmax, codes: cells(pack[`w_map_${i}`], consumer.rows), rows: consumer.rows, range: consumer.range, out: consumer.out });
  });
  return {
    group: pack.group, channels: pack.channels, order, sorted,
    tokensPerRow: pack.tokens_per_row, texts: pack.texts,
    x: { absmax: xAbsmax, codes: cells(pack.x_map, pack.rows), rows: pack.rows, range: pack.range },
    xLog: logs(arrange(pack.s_x)), foldLog: logs(arrange(pack.s_w)), weights, // what s is made from: see smoothing_pack.py
    expert: pack.expert,
  };
}

function makeStore(model) {
  const about = model.get("about");
  const rows = new Map(about.linears.map((row, index) => [row.name, { ...row, index }]));
  const raw = new Map(), ready = new Map(); // group -> pack as it came; group + order -> prepared
  const answers = new Map(); // linear + scheme -> [{alpha, error, how, tokens, rest}], the newest last
  let alpha = model.get("alpha"), sorted = false, frame = null;

  const remember = (map, key, value, most) => {
    map.delete(key);
    map.set(key, value);
    while (map.size > most) map.delete(map.keys().next().value);
  };
  const takePacks = (bytes) => {
    for (const pack of unpackAll(bytes)) {
      remember(raw, pack.group, pack, Math.max(KEEP_PACKS, about.embedded.length));
      for (const order of [true, false]) ready.delete(`${pack.group}|${order}`);
    }
  };
  const prepared = () => {
    const group = rows.get(store.linear).group, key = `${group}|${sorted}`;
    if (!ready.has(key) && raw.has(group)) remember(ready, key, preparePack(raw.get(group), sorted), 6);
    return ready.get(key) ?? null;
  };

  const store = {
    about, rows, live: hasKernel(model),
    get alpha() { return alpha; },
    get linear() { return model.get("linear"); },
    get row() { return rows.get(model.get("linear")); },
    get scheme() { return model.get("scheme"); },
    get folds() { return model.get("folds"); },
    get sorted() { return sorted; },
    set sorted(on) { sorted = on; frame = null; },
    setAlpha(value) { alpha = Math.min(1, Math.max(0, Math.round(value * 100) / 100)); },
    takePacks,
    dropFrame() { frame = null; },

    // Everything drawn from α and the vectors, computed once per α and linear: s and both maxima after scaling.
    now() {
      const pack = prepared();
      if (!pack) return null;
      const key = `${store.linear}|${sorted}|${alpha}`;
      if (frame?.key === key && frame.pack === pack) return frame;
      const w = pack.weights.get(store.linear);
      const s = smoothingScale(pack.xLog, pack.foldLog, alpha);
      const xAfter = pack.x.absmax.map((value, j) => value / s[j]), wAfter = w.absmax.map((value, j) => value * s[j]);
      return (frame = { key, pack, w, s, xAfter, wAfter });
    },

    // The swept errors of a linear under the present scheme: Float32Array [α…, unsmoothed], NaN not yet, < 0 not finite.
    sweepOf(linear) {
      const width = about.alphas.length + 1, all = store.sweeps;
      if (all.length === 0) return null;
      const index = rows.get(linear).index;
      return all.subarray(index * width, (index + 1) * width);
    },
    sweeps: new Float32Array(0),
    takeSweeps() {
      store.sweeps = model.get("sweeps_for") === schemeKey(store.scheme) ? asFloat32(model.get("sweeps")) : new Float32Array(0);
    },

    // The errors of the linear in view at every stop of the slider, as far as they are known: {errors, how, tokens}.
    stops: null,
    takeStops() {
      const stops = model.get("stops");
      store.stops = stops.for === `${store.linear}|${schemeKey(store.scheme)}` ? { ...stops, errors: asFloat32(stops.errors) } : null;
    },

    takeAnswer(answer) {
      if (!answer || !answer.linear) return;
      const key = `${answer.linear}|${answer.scheme}`;
      const old = answers.get(key) ?? [], same = old.find((known) => known.alpha === answer.alpha);
      if (same?.how === "exact" && answer.how !== "exact") return;
      // Of the values passed while moving only the newest is of use; where the hand rested, the last few.
      const list = [...old.filter((known) => known.rest && known !== same), { ...answer, rest: answer.rest || Boolean(same?.rest) }];
      remember(answers, key, list.slice(-KEEP_ANSWERS), 64);
    },
    answers() { return answers.get(`${store.linear}|${schemeKey(store.scheme)}`) ?? []; },

    // The error at today's α, and where it comes from: {error, how: "exact" | "sampled" | "interpolated" | "failed" | ""}.
    reading() {
      const answer = store.answers().find((known) => Math.abs(known.alpha - alpha) < 1e-9);
      if (answer) return answer;
      const found = store.stops?.errors[Math.round(alpha * (store.stops.errors.length - 1))];
      if (usable(found)) return { error: found, how: store.stops.how, tokens: store.stops.tokens };
      const sweep = store.sweepOf(store.linear);
      if (!sweep) return { error: NaN, how: "" };
      if (sweep[0] < 0) return { error: NaN, how: "failed" };
      const error = errorAt(about.alphas, sweep, alpha);
      return { error, how: Number.isFinite(error) ? "interpolated" : "" };
    },

    // Linears that can be shown here: all with a kernel, in an exported page those it carries.
    available: hasKernel(model) || !about.embedded.length ? about.linears.map((row) => row.name) : about.embedded,

    send(changes) {
      for (const [name, value] of Object.entries(changes)) model.set(name, value);
      model.save_changes();
    },
  };
  takePacks(model.get("picture"));
  takePacks(model.get("embedded"));
  store.takeSweeps();
  store.takeStops();
  store.takeAnswer(model.get("answer"));
  return store;
}

// Measures from an input event to the moment its frame has been painted: the next animation frame has drawn, and the
// task posted from inside it runs once the browser is done with that frame. One sample per burst of events.
function makeTimings(root) {
  const samples = (root.__sqviz_timings = []);
  let start = 0;
  return {
    begin(event) {
      if (start) return;
      const now = performance.now();
      start = event.timeStamp > 0 && event.timeStamp <= now ? event.timeStamp : now;
      requestAnimationFrame(() => {
        const channel = new MessageChannel();
        channel.port1.onmessage = () => {
          samples.push(performance.now() - start);
          if (samples.length > KEEP_TIMINGS) samples.shift();
          start = 0;
        };
        channel.port2.postMessage(0);
      });
    },
  };
}
