/** The colour scales: of shares, of values and of kernels; all perceptually uniform, and even around zero. */

import { make } from "./dom.js";
import { figure } from "./numbers.js";

/** @typedef {[number, number, number]} Colour 0 … 255 */
/**
 * @typedef {object} Scale
 * @property {number} lowest the value of the first colour
 * @property {number} highest the value of the last one
 * @property {Colour[]} colours 256 of them
 */

/** @type {{heat: Colour[], signed: Colour[], kernel: Colour[]}} */
const COLOURS = await (await fetch(new URL("colours.json", import.meta.url))).json();

/** For shares from 0 to 1: heat maps and probabilities. @type {Scale} */
export const HEAT = { lowest: 0, highest: 1, colours: COLOURS.heat };

/** For the values of layers: the same on both sides of 0, also where nothing is negative. @param {number} size the largest value of either sign */
export function valueScale(size) {
  return around(size, COLOURS.signed);
}

/** Of values, wide enough for all of them. @param {ArrayLike<number>} values */
export function signedScale(values) {
  return valueScale(largest(values));
}

/** Of learned weights, which are no values: wide enough for all of them. @param {ArrayLike<number>} weights */
export function kernelScale(weights) {
  return around(largest(weights), COLOURS.kernel);
}

/** The wider one of scales of values. @param {...Scale} scales */
export function widest(...scales) {
  return scales.reduce((one, other) => (other.highest > one.highest ? other : one));
}

/** The largest size of values of either sign. @param {ArrayLike<number>} values */
export function largest(values) {
  let size = 0;
  for (let i = 0; i < values.length; i += 1) size = Math.max(size, Math.abs(values[i]));
  return size;
}

function around(size, colours) {
  return { lowest: -(size || 1), highest: size || 1, colours };
}

/** @param {Scale} scale @returns {Colour} */
export function colourOf({ lowest, highest, colours }, value) {
  const at = Math.round(((value - lowest) / (highest - lowest)) * 255);
  return colours[Math.max(0, Math.min(255, at || 0))];
}

/** As CSS has it. */
export function css([red, green, blue]) {
  return `rgb(${red} ${green} ${blue})`;
}

/** Black or white, whichever reads better on a colour (contrast by WCAG's relative luminance). */
export function inkOn(colour) {
  const [red, green, blue] = colour.map((part) =>
    part <= 10 ? part / 3294 : ((part / 255 + 0.055) / 1.055) ** 2.4,
  );
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000" : "#fff";
}

/** A strip of a scale's colours with its ends named. @param {Scale} scale @param {[string, string]} [ends] */
export function legend(scale, ends = [figure(scale.lowest, 3), figure(scale.highest, 3)]) {
  const strip = make("canvas", { width: 256, height: 1, class: "strip" });
  paintStrip(strip, scale.colours);
  return make(
    "span",
    { class: "scale", role: "img", "aria-label": `Colours from ${ends[0]} to ${ends[1]}` },
    ends[0],
    strip,
    ends[1],
  );
}

function paintStrip(canvas, colours) {
  const pixels = new ImageData(256, 1);
  colours.forEach((colour, at) => pixels.data.set([...colour, 255], 4 * at));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}
