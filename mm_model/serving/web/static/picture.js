// Values to colours, legends and words, as /v1/modalities says that a modality is shown.
// Pixels are {width, height, bands}: NaN, or class 0, where nothing is known.

const isKnown = (value) => !Number.isNaN(value);

/** 1st and 99th percentile of what is known, half a unit apart at least; null if nothing is. */
export function robustLimits({ bands }) {
  const known = Float32Array.from(bands.flatMap((band) => Array.from(band).filter(isKnown))).sort();
  if (!known.length) return null;
  const at = (share) => {
    const place = share * (known.length - 1), below = Math.floor(place);
    const above = Math.min(below + 1, known.length - 1);
    return known[below] + (place - below) * (known[above] - known[below]);
  };
  const low = at(0.01), high = at(0.99);
  return high - low > 1e-6 ? [low, high] : [low - 0.5, high + 0.5];
}

/** A canvas of a modality's pixels; what is unknown stays transparent. */
export function paint(modality, pixels, limits) {
  const { display } = modality;
  const channels = display.channels.map((channel) => ({ ...channel, limits: limits ?? channel.limits }));
  if (!channels.length) return paintClasses(modality, pixels);
  if (channels.length === 1) return paintScale(pixels, valuesOf(channels[0], pixels), channels[0].limits, display.colors);
  const shown = channels.map((channel) => valuesOf(channel, pixels));
  return canvasOf(pixels, (k, out, at) => {
    for (let c = 0; c < 3; c++) {
      const share = shareOf(shown[c][k], channels[c].limits);
      if (Number.isNaN(share)) return;
      out[at + c] = Math.round(255 * share ** (1 / display.gamma));
    }
    out[at + 3] = 255;
  });
}

/** A canvas of one number a pixel, through 256 colours. */
export function paintScale(pixels, values, limits, colors) {
  const table = colors.map(rgbOf);
  return canvasOf(pixels, (k, out, at) => {
    const share = shareOf(values[k], limits);
    if (Number.isNaN(share)) return;
    out.set(table[Math.min(255, Math.floor(share * 256))], at);
    out[at + 3] = 255;
  });
}

function paintClasses(modality, pixels) {
  const table = new Map(modality.classes.map((entry) => [entry.code, rgbOf(entry.color)]));
  return canvasOf(pixels, (k, out, at) => {
    const color = table.get(pixels.bands[0][k]);
    if (!color) return;
    out.set(color, at);
    out[at + 3] = 255;
  });
}

function canvasOf({ width, height }, put) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let k = 0; k < width * height; k++) put(k, image.data, 4 * k);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function valuesOf({ weights }, { bands }) {
  return bands[0].map((_, k) => weights.reduce((sum, w, b) => (w ? sum + w * bands[b][k] : sum), 0));
}

const shareOf = (value, [low, high]) => Math.min(1, Math.max(0, (value - low) / (high - low)));

const rgbOf = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/**
 * What samples have in common, and where they differ.
 *
 * Of numbers the mean, and the standard deviation averaged over the bands, in the unit. Of classes
 * the most frequent one, and the entropy in bits of the shares of the samples.
 *
 * @returns {{mean: object, spread: Float32Array}} pixels, and a number a pixel (NaN: unknown)
 */
export function moments(modality, samples) {
  return modality.kind === "categorical" ? votes(samples) : averages(samples);
}

function averages(samples) {
  const [{ width, height, bands }] = samples;
  const spread = new Float32Array(width * height);
  const means = bands.map((_, b) => Float32Array.from({ length: width * height }, (_, k) => {
    let mean = 0, squares = 0;
    samples.forEach((sample, n) => {
      const change = sample.bands[b][k] - mean;
      mean += change / (n + 1);
      squares += change * (sample.bands[b][k] - mean);
    });
    spread[k] += Math.sqrt(squares / (samples.length - 1)) / bands.length;
    return mean;
  }));
  return { mean: { width, height, bands: means }, spread };
}

function votes(samples) {
  const [{ width, height }] = samples;
  const codes = new Uint8Array(width * height), spread = new Float32Array(width * height);
  for (let k = 0; k < codes.length; k++) {
    const counts = new Map();
    for (const { bands } of samples) counts.set(bands[0][k], (counts.get(bands[0][k]) ?? 0) + 1);
    if (counts.has(0)) {
      spread[k] = NaN;
      continue;
    }
    let most = 0;
    for (const [code, count] of counts) {
      const p = count / samples.length;
      spread[k] -= p * Math.log2(p);
      if (count > most) [most, codes[k]] = [count, code];
    }
  }
  return { mean: { width, height, bands: [codes] }, spread };
}

/** The 99th percentile of amounts, where their scale ends. */
export function mostOf(values) {
  const known = values.filter(isKnown).sort();
  return known.length ? known[Math.round(0.99 * (known.length - 1))] || 1 : 1;
}

export const unitOf = ({ unit }) => (unit === "1" ? "" : ` ${unit}`);

/** A number as people read it, three digits that count. */
export function inWords(value, unit = "") {
  if (Number.isNaN(value)) return "unknown";
  const digits = value === 0 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(digits, 4)).replace("-", "−") + unit;
}

/** A number of three digits at most, as legends have them. */
const short = (value) => String(+value.toPrecision(3)).replace("-", "−");

const percent = (share) => (share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);

/** The values of a pixel in words. */
export function valuesInWords(modality, { bands }, k) {
  if (modality.kind === "categorical") {
    return modality.classes.find(({ code }) => code === bands[0][k])?.name ?? "unknown";
  }
  return bands.map((band, b) =>
    (bands.length > 1 ? `${modality.bands[b].name} ` : "") + inWords(band[k], unitOf(modality))).join(", ");
}

/** Elements that say what the colours of a layer mean. */
export function legendOf(modality, pixels, limits) {
  const { channels, gamma, colors } = modality.display;
  if (!channels.length) return [classList(modality, pixels)];
  const range = (channel) => (limits ?? channel.limits).map((v) => short(v)).join(" to ") + unitOf(modality);
  if (channels.length === 1) return scaleOf(colors, limits ?? channels[0].limits, unitOf(modality));
  const names = ["Red", "Green", "Blue"];
  const list = element("dl", channels.flatMap((channel, c) => [
    element("dt", names[c]), element("dd", `${channel.name}, ${range(channel)}`),
  ]));
  return gamma === 1 ? [list] : [list, element("p", `Brightened with gamma ${gamma}.`, "hint")];
}

/** A bar of colours with its ends and middle. */
export function scaleOf(colors, [low, high], unit) {
  const bar = document.createElement("canvas");
  [bar.width, bar.height, bar.className] = [256, 1, "scale"];
  const context = bar.getContext("2d");
  colors.forEach((color, k) => {
    context.fillStyle = color;
    context.fillRect((k * 256) / colors.length, 0, 256 / colors.length + 1, 1);
  });
  const ticks = [low, (low + high) / 2, high].map((value) => element("span", short(value) + unit));
  return [bar, element("div", ticks, "ticks")];
}

function classList(modality, { bands: [codes] }) {
  const counts = new Map();
  let known = 0;
  for (const code of codes) {
    if (!code) continue;
    counts.set(code, (counts.get(code) ?? 0) + 1);
    known++;
  }
  const found = modality.classes.filter(({ code }) => counts.has(code));
  return element("ul", found.map(({ code, name, color }) => {
    const swatch = document.createElement("canvas");
    swatch.width = swatch.height = 1;
    const context = swatch.getContext("2d");
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return element("li", [swatch, `${name}, ${percent(counts.get(code) / known)}`]);
  }), "classes");
}

/** An element with text or children. */
export function element(tag, content = [], className = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...[content].flat());
  return made;
}
