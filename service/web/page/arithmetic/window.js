/** What a sliding window covers. */

/**
 * @typedef {object} Patch
 * @property {Float64Array} values (kernel height x kernel width), row by row; 0 where there is only padding
 * @property {boolean[]} outside which of them lie in the padding
 */

/**
 * The values under the window of output (row, column).
 * @param {import("../api.js").Layer} layer with kernel, stride, padding and dilation
 * @param {Float32Array} map (height, width)
 * @param {[number, number]} size height and width
 * @returns {Patch}
 */
export function patchAt(layer, map, [height, width], row, column) {
  const [down, across] = layer.kernel;
  const values = new Float64Array(down * across);
  const outside = [];
  for (let i = 0; i < values.length; i += 1) {
    const [y, x] = placeOf(layer, row, column, Math.floor(i / across), i % across);
    const inside = y >= 0 && y < height && x >= 0 && x < width;
    outside.push(!inside);
    if (inside) values[i] = map[y * width + x];
  }
  return { values, outside };
}

/** Where the window's cell (down, across) lies in the input. */
function placeOf({ stride, padding, dilation }, row, column, down, across) {
  return [
    row * stride[0] - padding[0] + down * dilation[0],
    column * stride[1] - padding[1] + across * dilation[1],
  ];
}

/** The window's corner and size in the input: top, left, height, width. */
export function windowAt(layer, row, column) {
  const { kernel, dilation } = layer;
  return [
    ...placeOf(layer, row, column, 0, 0),
    (kernel[0] - 1) * dilation[0] + 1,
    (kernel[1] - 1) * dilation[1] + 1,
  ];
}
