/** Which colours a layer is shown with: a value keeps its colour where it goes on unchanged. */

import { HEAT, largest, signedScale, valueScale, widest } from "./colours.js";
import { SHOWN } from "./columns.js";
import { RECTIFIERS } from "./names.js";

/** Kinds whose outputs are inputs that go on as they are, or nearly so, or not at all. */
const KEEPING = new Set([
  ...RECTIFIERS,
  "MaxPool",
  "GlobalMaxPool",
  "ReduceMax",
  "Flatten",
  "Concat",
  "Pad",
]);

/** A layer whose typical map has less than this share of the layer's range would be pale. */
const PALE = 0.5;

/** Kinds that end a stage. */
const POOLS = new Set(["MaxPool", "AveragePool"]);

/**
 * Numbers of the stages of layers. A stage begins after a pooling, and with a layer whose window makes larger steps.
 * @param {import("./api.js").Layer[]} layers
 */
function stagesOf(layers) {
  let stage = 0;
  return layers.map(({ kind, stride }, at) => {
    const isPooled = at > 0 && POOLS.has(layers[at - 1].kind);
    const isStriding = !POOLS.has(kind) && stride?.some((step) => step > 1);
    if (isPooled || isStriding) stage += 1;
    return stage;
  });
}

/** Whether values pass a layer unchanged, where they pass. @param {import("./api.js").Layer} layer */
export function keepsValues({ kind }) {
  return KEEPING.has(kind);
}

/** The scales of all layers on the page, for one photo. */
export class LayerScales {
  /**
   * @param {import("./api.js").Description} description
   * @param {import("./tensors.js").Tensors} tensors
   * @param {(tensor: string) => boolean} isShown whether a layer has maps on the page; others are not asked for
   */
  constructor(description, tensors, isShown) {
    this.#description = description;
    this.#tensors = tensors;
    this.#isShown = isShown;
  }

  #description;
  #tensors;
  #isShown;

  /**
   * One for all maps of a layer; or for all of its stage, or of the network.
   * @param {import("./api.js").Layer} layer @param {import("./network.js").Stretch} [stretch]
   * @returns {Promise<import("./colours.js").Scale>}
   */
  async ofLayer(layer, stretch) {
    if (this.#isProbability(layer)) return HEAT;
    const sizes = this.#sharingScale(layer, stretch).map((one) => this.#sizeOf(one));
    return valueScale(Math.max(...(await Promise.all(sizes))));
  }

  /** The layers on the page that have one scale with a layer. The input and vectors have their own. */
  #sharingScale(layer, stretch) {
    const areMaps = ({ kind, shape }) => kind !== "Input" && shape.length === 3;
    if (!areMaps(layer) || (stretch !== "stage" && stretch !== "network")) return [layer];
    const layers = this.#description.layers.filter(areMaps);
    const stages = stagesOf(layers);
    const isSharing = (one, at) => stretch === "network" || stages[at] === stages[layers.indexOf(layer)];
    return layers.filter((one, at) => one === layer || (isSharing(one, at) && this.#isShown(one.tensor)));
  }

  /** The whole range of colours for each map by itself. @param {ArrayLike<number>[]} maps */
  ofEach(maps) {
    return maps.map(signedScale);
  }

  /**
   * As `ofEach`, but with the range of the maps before, where values keep their colour.
   * @param {import("./api.js").Layer} layer
   * @param {number[]} indices of the maps
   * @param {ArrayLike<number>[]} maps
   */
  async ofEachKept(layer, indices, maps) {
    const own = this.ofEach(maps);
    const source = this.#keptSource(layer);
    if (!source) return own;
    const before = await this.ofEachKept(source, indices, await this.#mapsOf(source, indices));
    return own.map((scale, at) => widest(scale, before[at]));
  }

  /** Whether maps would be hard to see with the scale of their layer; the same for layers through which values pass. */
  async isPale(layer) {
    const source = this.#keptSource(layer);
    if (source) return this.isPale(source);
    const maps = await this.#mapsOf(layer, [...Array(Math.min(SHOWN, layer.shape[0])).keys()]);
    const sizes = maps.map(largest).sort((one, other) => one - other);
    return sizes[Math.floor(sizes.length / 2)] < PALE * (await this.ofLayer(layer)).highest;
  }

  async #sizeOf(layer) {
    const before = keepsValues(layer) ? this.#sourcesOf(layer).map((source) => this.#sizeOf(source)) : [];
    const { lowest, highest } = await this.#tensors.range(layer.tensor);
    return Math.max(-lowest, highest, ...(await Promise.all(before)));
  }

  /** Those that are shown. */
  #sourcesOf({ sources }) {
    const { layers } = this.#description;
    return layers.filter(({ tensor }) => sources.includes(tensor) && this.#isShown(tensor));
  }

  /** The layer whose maps go on into maps with the same numbers; null if there is none on the page. */
  #keptSource(layer) {
    const [source, ...others] = keepsValues(layer) ? this.#sourcesOf(layer) : [];
    const isSame = source && !others.length && layer.sources.length === 1 && source.shape[0] === layer.shape[0];
    return isSame && source.shape.length === 3 && layer.shape.length === 3 ? source : null;
  }

  async #mapsOf({ tensor, shape: [, height, width] }, indices) {
    const { values } = await this.#tensors.selected(tensor, indices);
    const size = height * width;
    return indices.map((_, at) => values.subarray(at * size, (at + 1) * size));
  }

  /** Whether values are probabilities: of a softmax over labels, or of the sigmoid at the end. */
  #isProbability({ kind, shape, tensor }) {
    const { layers } = this.#description;
    if (kind === "Softmax") return shape.length === 1;
    return kind === "Sigmoid" && layers[layers.length - 1].tensor === tensor;
  }
}
