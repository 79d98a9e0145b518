/** The values that an arithmetic is shown with: of the layer's own map, and of those that it is made of. */

import { scaleFor, signedScale } from "./colours.js";

/**
 * @typedef {object} Operand
 * @property {Float32Array} values of one map, row by row; of a vector one value
 * @property {[number, number]} size height and width; 1 x 1 of a vector
 * @property {import("./colours.js").Scale} scale of this map alone: enlarged, it may show what is faint among others
 */

/**
 * One map of a layer, or one value of a vector.
 * @param {import("./tensors.js").Tensors} tensors
 * @param {import("./api.js").Layer} layer
 * @param {number} index
 * @returns {Promise<Operand>}
 */
export async function operand(tensors, layer, index) {
  const maps = await tensors.maps(layer.tensor, index, 1);
  const [, height = 1, width = 1] = layer.shape;
  return { values: maps.values, size: [height, width], scale: ownScale(maps.values, maps) };
}

/** The colours of one map; of the same kind as its layer's. @param {{lowest: number}} layer */
export function ownScale(values, { lowest }) {
  return lowest < 0
    ? signedScale(values)
    : scaleFor(
        0,
        values.reduce((one, other) => Math.max(one, other), 0),
      );
}

/** The map of a source that has the same place as map `index`; its only one where it is spread over all. */
export function counterpart(source, index) {
  return source.shape[0] === 1 ? 0 : index;
}
