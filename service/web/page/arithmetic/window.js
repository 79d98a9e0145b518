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

/**
 * What a kernel makes of one map: at each place the sum of its products.
 * @param {import("../api.js").Layer} layer
 * @param {Float32Array} map (height, width)
 * @param {[number, number]} size height and width
 * @param {Float32Array} kernel (kernel height, kernel width)
 * @returns {Float64Array} (rows, columns) of the layer's maps
 */
export function slide(layer, map, [height, width], kernel) {
  const [, rows, columns] = layer.shape;
  const sums = new Float64Array(rows * columns);
  kernel.forEach((weight, at) => {
    const across = layer.kernel[1];
    const [top, left] = placeOf(layer, 0, 0, Math.floor(at / across), at % across);
    for (let i = 0; i < sums.length; i += 1) {
      const y = top + Math.floor(i / columns) * layer.stride[0];
      const x = left + (i % columns) * layer.stride[1];
      if (y >= 0 && y < height && x >= 0 && x < width) sums[i] += weight * map[y * width + x];
    }
  });
  return sums;
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

/**
 * The input's pixel in the middle of the window of an output.
 * @param {import("../api.js").Layer} layer
 * @param {{row: number, column: number}} spot of the output
 * @param {[number, number]} size height and width of the input
 */
export function middleOfWindow(layer, { row, column }, [height, width]) {
  const [down, across] = layer.kernel.map((size) => Math.floor(size / 2));
  const [y, x] = placeOf(layer, row, column, down, across);
  return { row: Math.max(0, Math.min(height - 1, y)), column: Math.max(0, Math.min(width - 1, x)) };
}
