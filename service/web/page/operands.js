/** The values that an arithmetic is shown with: of the layer's own map, and of those that it is made of. */

import { signedScale, widest } from "./colours.js";

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
  return { values: maps.values, size: [height, width], scale: signedScale(maps.values) };
}

/** Operands with one scale for all: for maps of which values go on unchanged. @param {Operand[]} operands @returns {Operand[]} */
export function withOneScale(operands) {
  const scale = widest(...operands.map((one) => one.scale));
  return operands.map((one) => ({ ...one, scale }));
}

/** Whether a layer has one value for each of its maps. @param {import("./api.js").Layer} layer */
export function isVector({ shape }) {
  return shape.length > 0 && shape.slice(1).every((side) => side === 1);
}

/** The map of a source that has the same place as map `index`; its only one where it is spread over all. */
export function counterpart(source, index) {
  return source.shape[0] === 1 ? 0 : index;
}
