/** The way from a value back to the map that it was made of. */

import { linked, placeOf } from "./links.js";

/** @typedef {import("./api.js").Layer} Layer */
/**
 * @typedef {object} Origin a map, and the place in it that a value is a copy of
 * @property {Layer} layer
 * @property {number} index of the map
 * @property {{row: number, column: number} | null} place null: the value is made of all places of the map
 */

/** Whether a layer has maps with more than one pixel. @param {Layer} layer */
export function hasPlaces({ shape }) {
  return shape.length === 3 && shape[1] * shape[2] > 1;
}

/** The layers that a layer reads. @param {Layer[]} layers @param {Layer} layer @returns {Layer[]} */
export function sourcesOf(layers, { sources }) {
  return sources.map((tensor) => layers.find((one) => one.tensor === tensor)).filter(Boolean);
}

/**
 * The nearest map that a value was made of alone: through pooling, flattening and functions of single values.
 * @param {Layer[]} layers
 * @param {Layer} layer
 * @param {number} index of the value or map
 * @returns {Origin | null} null where the value is made of several maps
 */
export function originOf(layers, layer, index) {
  let place = null;
  while (!hasPlaces(layer)) {
    const [source, ...others] = sourcesOf(layers, layer);
    if (!source || others.length || !layer.direct) return null;
    const range = linked(layer, index, source, [source]);
    if (!range || range[0] !== range[1]) return null;
    if (layer.order && hasPlaces(source)) place = placeOf(layer.order, index, source.shape);
    [layer, index] = [source, range[0]];
  }
  return { layer, index, place: place && { row: place.row, column: place.column } };
}
