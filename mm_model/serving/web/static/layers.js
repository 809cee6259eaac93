// What can be shown: observed layers, and generated ones with their draws, mean and spread.

import { readGeotiff } from "./geotiff.js";
import { inWords, legendOf, moments, mostOf, paint, paintScale, robustLimits, scaleOf, unitOf, valuesInWords } from "./picture.js";

export class Layers {
  all = new Map(); // id → layer
  amountColors = [];

  /** Replace the observed layers by those of an aligned zip (null for none). */
  observed(aligned, modalities) {
    const kept = [...this.all].filter(([id]) => !id.startsWith("observed "));
    const found = [...modalities.values()].flatMap((modality) => {
      const bytes = aligned?.zip.get(`${modality.name}.tif`);
      return bytes ? [new Layer("observed", modality, aligned.grid, [bytes], this)] : [];
    });
    this.all = new Map([...found.map((layer) => [layer.id, layer]), ...kept]);
  }

  /** Replace the generated layers by those of an answer: {modality, sample, bytes} each. */
  generated(files, grid, modalities) {
    const kept = [...this.all].filter(([id]) => !id.startsWith("generated "));
    const byName = Map.groupBy(files, ({ modality }) => modality);
    const made = [...byName].map(([name, draws]) => new Layer("generated", modalities.get(name), grid, draws.map(({ bytes }) => bytes), this));
    this.all = new Map([...kept, ...made.map((layer) => [layer.id, layer])]);
  }
}

class Layer {
  #files;
  #pixels = new Map(); // draw → promise of its pixels; decoded when first looked at
  #moments;
  #owner;

  constructor(group, modality, grid, files, owner) {
    Object.assign(this, { group, modality, grid, id: `${group} ${modality.name}` });
    this.#files = files;
    this.#owner = owner;
    const classes = modality.kind === "categorical";
    this.draws = files.map((_, k) => [String(k), `draw ${k + 1}`]);
    if (files.length > 1) this.draws.push(["mean", classes ? "most frequent" : "mean"], ["spread", classes ? "entropy" : "spread"]);
  }

  /** What the map and the legend need: {grid, picture, title, legend, say}. */
  async look(draw) {
    const { modality, grid, group } = this;
    const several = this.draws.length > 1;
    const which = several ? `, ${this.draws.find(([value]) => value === draw)[1]}` : "";
    const title = `${modality.title}: ${group}${which}`;
    if (draw === "spread") {
      const { spread } = await this.#all();
      const classes = modality.kind === "categorical";
      const limits = [0, mostOf(spread)], unit = classes ? " bit" : unitOf(modality);
      const picture = paintScale(grid, spread, limits, this.#owner.amountColors);
      const legend = scaleOf(this.#owner.amountColors, limits, unit);
      const over = modality.bands.length > 1 ? ", mean of the bands" : "";
      return { grid, picture, legend, title: title + over, say: (k) => inWords(spread[k], unit) };
    }
    const pixels = draw === "mean" ? (await this.#all()).mean : await this.#read(+draw);
    const limits = modality.display.relative ? robustLimits(await this.#read(0)) : null;
    return {
      grid, title,
      picture: paint(modality, pixels, limits),
      legend: legendOf(modality, pixels, limits),
      say: (k) => valuesInWords(modality, pixels, k),
    };
  }

  #read(k) {
    if (!this.#pixels.has(k)) this.#pixels.set(k, readGeotiff(this.#files[k]));
    return this.#pixels.get(k);
  }

  #all() {
    this.#moments ??= Promise.all(this.#files.map((_, k) => this.#read(k))).then((samples) => moments(this.modality, samples));
    return this.#moments;
  }
}
