/** Maps of numbers onto canvases, one pixel for each value. */

import { colourOf } from "./colours.js";

/**
 * Paint one map.
 * @param {HTMLCanvasElement} canvas takes the map's size
 * @param {ArrayLike<number>} values (height, width), row by row
 * @param {import("./colours.js").Scale} scale
 */
export function paint(canvas, values, height, width, scale) {
  canvas.width = width;
  canvas.height = height;
  const pixels = new ImageData(width, height);
  for (let i = 0; i < width * height; i += 1) {
    const [red, green, blue] = colourOf(scale, values[i]);
    pixels.data[4 * i] = red;
    pixels.data[4 * i + 1] = green;
    pixels.data[4 * i + 2] = blue;
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}
