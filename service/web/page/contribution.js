/** What each map before the last linear layer adds to a label's score: weight times value, as the network adds them. */

import { inputOf, isLinear } from "./arithmetic/linear.js";
import { isVector, operand } from "./operands.js";
import { originOf, sourcesOf } from "./origin.js";

/** @typedef {import("./api.js").Layer} Layer */
/**
 * @typedef {object} Contribution
 * @property {Layer} layer that has the map, or the value where that is made of several maps
 * @property {number} index of the map, or of the value
 * @property {number} value what it adds to the score
 * @property {{row: number, column: number} | null} place of the map that adds most; null for a value
 */
/** @typedef {{contributions: Contribution[], score: number}} Contributions largest first; and the score, without its bias */

/**
 * The linear layer that makes the labels' scores; null where the network ends in another way.
 * @param {import("./api.js").Description} description
 * @returns {Layer | null}
 */
export function headOf({ layers, labels }) {
  let layer = layers[layers.length - 1];
  while (layer && !isHead(layers, layer)) {
    const sources = sourcesOf(layers, layer);
    // Two labels with one score are joined from one probability and the rest to 1.
    const isJoined = layer.kind === "Concat" && labels.length === 2;
    layer = (sources.length === 1 || isJoined) && isVector(layer) ? sources[sources.length - 1] : null;
  }
  const count = layer?.shape[0];
  return layer && (count === labels.length || (count === 1 && labels.length === 2)) ? layer : null;
}

/** Whether it multiplies values with weights that are shown, and each value has a place in the network. */
function isHead(layers, layer) {
  const [source] = sourcesOf(layers, layer);
  if (!source || !layer.direct || !isVector(layer) || !isVector(source)) return false;
  return isLinear(layer) || (layer.kind === "Conv" && layer.weights.includes("weight") && layer.groups === 1);
}

/**
 * What each map adds to the score of each of some labels. With two labels: to the first rather than to the second.
 * @param {import("./api.js").Description} description
 * @param {import("./tensors.js").Tensors} tensors
 * @param {number} label
 * @param {number | null} [other]
 * @returns {Promise<Contributions | null>} null where the network does not end in a linear layer
 */
export async function contributionsTo(description, tensors, label, other = null) {
  const head = headOf(description);
  if (!head) return null;
  const { layers } = description;
  const [source] = sourcesOf(layers, head);
  const [given, weights, others] = await Promise.all([
    tensors.maps(isLinear(head) ? inputOf(head, [source]) : source.tensor),
    weightsOf(head, tensors, label),
    other === null ? null : weightsOf(head, tensors, other),
  ]);
  const products = Array.from(given.values, (value, at) => value * (weights[at] - (others ? others[at] : 0)));
  const contributions = byMap(layers, source, products).sort((one, two) => two.value - one.value);
  return { contributions, score: products.reduce((sum, product) => sum + product, 0) };
}

/** Of one label; a network with one score for two labels has the negative for the first. */
async function weightsOf(head, tensors, label) {
  const isBinary = head.shape[0] === 1;
  const { values } = await tensors.weights(head.tensor, "weight", isBinary ? 0 : label, 1);
  const { alpha = 1 } = /** @type {Record<string, number>} */ (head.attributes);
  const factor = isBinary && !label ? -alpha : alpha;
  return values.map((weight) => factor * weight);
}

/** Products of the same map together: a flattened map has many. @returns {(Contribution & {best: number})[]} */
function byMap(layers, source, products) {
  const found = new Map();
  products.forEach((value, at) => {
    const origin = originOf(layers, source, at) ?? { layer: source, index: at, place: null };
    const key = `${origin.layer.tensor} ${origin.index}`;
    const known = found.get(key) ?? { ...origin, value: 0, best: -Infinity };
    known.value += value;
    if (value > known.best) Object.assign(known, { best: value, place: origin.place });
    found.set(key, known);
  });
  return [...found.values()];
}

/**
 * The place of a contribution's map that adds most: the flattened value's own, or of a pooled map the strongest.
 * @param {import("./tensors.js").Tensors} tensors
 * @param {Contribution} contribution
 * @returns {Promise<{row: number, column: number}>}
 */
export async function strongestPlace(tensors, { layer, index, place }) {
  if (place) return place;
  const { values, size: [, width] } = await operand(tensors, layer, index);
  const sum = values.reduce((total, value) => total + value, 0);
  const sign = sum < 0 ? -1 : 1; // what makes the mean large
  const at = values.reduce((best, value, here) => (sign * value > sign * values[best] ? here : best), 0);
  return { row: Math.floor(at / width), column: at % width };
}
