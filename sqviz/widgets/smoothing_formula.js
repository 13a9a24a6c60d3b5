// The arithmetic of the smoothing explorer, apart from any drawing: it runs at every frame, with or without a kernel.
// `smoothingScale` is the twin of sqviz.quant.smooth.smoothing_scale; a test holds the two together.

const SCALE_MIN = 1e-5, SCALE_MAX = 1e5; // as in Python: s is clamped, so that X/s and s·W stay finite

// s_j = max|X_j|^α / max|W_j|^(1-α), thesis equation 3.4; 1 where either maximum is 0 (a dead channel has nothing to move).
// xLog, wLog: natural logarithms of the maxima (see `logs`), taken once per linear. Returns float32 [channel].
const smoothingScale = (xLog, wLog, alpha, out = new Float32Array(xLog.length)) => {
  for (let j = 0; j < out.length; j++) {
    const log = alpha * xLog[j] - (1 - alpha) * wLog[j];
    const s = Math.exp(log);
    out[j] = Number.isFinite(xLog[j]) && Number.isFinite(wLog[j]) ? Math.min(SCALE_MAX, Math.max(SCALE_MIN, s)) : 1;
  }
  return out;
};

const logs = (values) => Float64Array.from(values, Math.log);

// uint8 log codes: 0 is zero, k in 1..255 is 10^(lo + (k-1)/254·(hi-lo)); `range` is [lo, hi].
const codesPerDecade = (range) => 254 / (range[1] - range[0]);
const decodeLog = (code, range) => (code > 0 ? 10 ** (range[0] + (code - 1) / codesPerDecade(range)) : 0);
// The (unrounded, unclamped) code of a positive value: the place on the colour scale.
const codeOf = (value, range) => 1 + (Math.log10(value) - range[0]) * codesPerDecade(range);

// Scaling a channel by f shifts its codes by a constant: the shift in codes, rounded. Int16 [channel].
// `sign` is -1 for X/s, +1 for s·W.
const codeShifts = (s, range, sign, out = new Int16Array(s.length)) => {
  const unit = sign * codesPerDecade(range);
  for (let j = 0; j < s.length; j++) out[j] = Math.round(Math.log10(s[j]) * unit);
  return out;
};

// Max-pool rows of codes [row][channel] to at most `rows` rows. Exact before scaling, because a channel keeps its order
// along tokens whatever s is; the same is not true along channels, which `shadeCells` pools after shifting.
const poolRows = (codes, from, channels, rows) => {
  if (rows >= from) return { codes, rows: from };
  const pooled = new Uint8Array(rows * channels);
  for (let r = 0; r < from; r++) {
    const to = Math.floor((r * rows) / from) * channels;
    for (let j = 0, i = r * channels; j < channels; j++, i++) if (codes[i] > pooled[to + j]) pooled[to + j] = codes[i];
  }
  return { codes: pooled, rows };
};

const permuteColumns = (codes, rows, order) => {
  const channels = order.length, out = new Uint8Array(codes.length);
  for (let r = 0, i = 0; r < rows; r++) for (let j = 0; j < channels; j++, i++) out[i] = codes[r * channels + order[j]];
  return out;
};

const DEAD = -32768; // the shifted code of an exact zero: below every other
const LEAST = DEAD + 4096; // the largest of cells that are all zero: so far above them that they count as lost

// Shifted codes, max-pooled along channels to `columns` when there are more channels than columns. Int16 [row][column];
// `rowMax` Int16 [row] receives the largest of each row (LEAST at least), from which a per-token step follows.
const shiftCells = (codes, rows, channels, shifts, columns, out, rowMax) => {
  if (columns >= channels) {
    for (let r = 0, i = 0; r < rows; r++) {
      let most = LEAST;
      for (let j = 0; j < channels; j++, i++) {
        const code = codes[i], value = code === 0 ? DEAD : code + shifts[j];
        out[i] = value;
        if (value > most) most = value;
      }
      rowMax[r] = most;
    }
    return;
  }
  for (let r = 0, i = 0, o = 0; r < rows; r++) {
    let top = LEAST;
    for (let p = 0; p < columns; p++, o++) {
      const end = r * channels + Math.floor(((p + 1) * channels) / columns);
      let most = DEAD;
      for (; i < end; i++) {
        const code = codes[i], value = code === 0 ? DEAD : code + shifts[i - r * channels];
        if (value > most) most = value;
      }
      out[o] = most;
      if (most > top) top = most;
    }
    rowMax[r] = top;
  }
};

// Painting compares a cell with the largest of those that share its quantisation step, `top` (a shifted code): it becomes
// the integer 127·10^-(distance), and 0 from `below` codes on, half a step. A ground says which top holds for cell (r, p):
// {top: Int16Array, stride, part: Int32Array [column] or null, below}; it is top[r·stride + (part ? part[p] : 0)].
const SHADES = 4096, SHADE_BIAS = 1024; // static steps may be exceeded: then the distance is negative

// The colour of every distance from the top, at index distance + SHADE_BIAS.
const shadesOf = (below, lut, lost, out = new Uint32Array(SHADES)) => {
  for (let i = 0; i < SHADES; i++) {
    const distance = i - SHADE_BIAS;
    out[i] = distance > below ? lost : lut[distance < 0 ? 255 : Math.round(((below - distance) * 255) / below)];
  }
  return out;
};

// Colours shifted cells; returns how many are lost, that is, become 0.
const paintCells = (cells, rows, columns, { top, stride, part, below }, shades, out) => {
  const limit = Math.floor(below) + SHADE_BIAS, last = SHADES - 1;
  let count = 0;
  for (let r = 0, i = 0; r < rows; r++) {
    const base = r * stride, most = (part ? 0 : top[base]) + SHADE_BIAS;
    for (let p = 0; p < columns; p++, i++) {
      const at = (part ? top[base + part[p]] + SHADE_BIAS : most) - cells[i];
      out[i] = shades[at < 0 ? 0 : at > last ? last : at];
      if (at > limit) count++;
    }
  }
  return count;
};

// The largest code of each channel: with it, the largest shifted code is known before any cell is shifted.
const tallest = (codes, rows, channels, out = new Uint8Array(channels)) => {
  for (let r = 0, i = 0; r < rows; r++) for (let j = 0; j < channels; j++, i++) if (codes[i] > out[j]) out[j] = codes[i];
  return out;
};
const topOf = (most, shifts) => {
  let top = LEAST;
  for (let j = 0; j < most.length; j++) if (most[j] > 0 && most[j] + shifts[j] > top) top = most[j] + shifts[j];
  return top;
};

// `shiftCells` and `paintCells` in one pass, for a step that all cells share and a column per channel: the usual frame.
const paintCodes = (codes, rows, channels, shifts, top, below, shades, out) => {
  const limit = Math.floor(below) + SHADE_BIAS, last = SHADES - 1, from = new Int32Array(channels);
  for (let j = 0; j < channels; j++) from[j] = top + SHADE_BIAS - shifts[j];
  let count = 0;
  for (let r = 0, i = 0; r < rows; r++) {
    for (let j = 0; j < channels; j++, i++) {
      const code = codes[i], at = code === 0 ? last : from[j] - code;
      out[i] = shades[at < 0 ? 0 : at > last ? last : at];
      count += at > limit ? 1 : 0;
    }
  }
  return count;
};

// How many cells are lost, without painting them.
const countLost = (cells, rows, columns, { top, stride, part, below }) => {
  const limit = Math.floor(below);
  let count = 0;
  for (let r = 0, i = 0; r < rows; r++) {
    const base = r * stride;
    for (let p = 0; p < columns; p++, i++) if (top[base + (part ? part[p] : 0)] - cells[i] > limit) count++;
  }
  return count;
};

// ---- the error curve ------------------------------------------------------------------------------------------------

const usable = (error) => Number.isFinite(error) && error > 0;

// The error at α from the sweep: linear in log(error) between the neighbouring values. NaN where they are not there.
const errorAt = (alphas, errors, alpha) => {
  const last = alphas.length - 1;
  let k = 0;
  while (k < last - 1 && alphas[k + 1] <= alpha) k++;
  const part = Math.min(1, Math.max(0, (alpha - alphas[k]) / (alphas[k + 1] - alphas[k])));
  if (part === 0) return usable(errors[k]) ? errors[k] : NaN;
  if (part === 1) return usable(errors[k + 1]) ? errors[k + 1] : NaN;
  if (!usable(errors[k]) || !usable(errors[k + 1])) return NaN;
  return Math.exp((1 - part) * Math.log(errors[k]) + part * Math.log(errors[k + 1]));
};

// The sweet spot: the α around the smallest swept error where the error stays within `slack` times it.
// {lo, hi, best, error}, or null when nothing was swept.
const sweetSpot = (alphas, errors, slack = 1.1) => {
  let best = -1;
  for (let k = 0; k < alphas.length; k++) if (usable(errors[k]) && (best < 0 || errors[k] < errors[best])) best = k;
  if (best < 0) return null;
  const limit = errors[best] * slack;
  const edge = (step) => {
    let k = best;
    while (usable(errors[k + step]) && errors[k + step] <= limit) k += step;
    const next = errors[k + step];
    if (!usable(next)) return alphas[k];
    const part = Math.log(limit / errors[k]) / Math.log(next / errors[k]); // next > limit >= errors[k]: in [0, 1)
    return alphas[k] + part * (alphas[k + step] - alphas[k]);
  };
  return { lo: edge(-1), hi: edge(1), best: alphas[best], error: errors[best] };
};

// Signal to quantisation noise in dB: the relative Frobenius error seen as a ratio of powers.
const sqnrDb = (error) => -20 * Math.log10(error);

// ---- packs: several arrays in one run of bytes ------------------------------------------------------------------------
// u32 total bytes, u32 bytes of header, header (JSON), arrays at 8-byte bounds; little-endian. Several may follow another.

const ARRAYS = { u1: Uint8Array, f4: Float32Array, i4: Int32Array };

const unpackAll = (bytes) => {
  const packs = [];
  if (!bytes || !bytes.byteLength) return packs;
  const view = new DataView(bytes.buffer, bytes.byteOffset ?? 0, bytes.byteLength);
  for (let start = 0; start < view.byteLength; start += view.getUint32(start, true)) {
    const length = view.getUint32(start + 4, true);
    const text = new Uint8Array(view.buffer, view.byteOffset + start + 8, length);
    const pack = JSON.parse(new TextDecoder().decode(text));
    for (const [name, { kind, offset, count }] of Object.entries(pack.arrays)) {
      const Kind = ARRAYS[kind], from = view.byteOffset + start + offset;
      pack[name] = new Kind(view.buffer.slice(from, from + count * Kind.BYTES_PER_ELEMENT)); // a copy: any alignment
    }
    packs.push(pack);
  }
  return packs;
};
