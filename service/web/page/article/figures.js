/** The article's pictures: each is made by the served model. */

import { functionOf } from "../arithmetic/functions.js";
import { Curve } from "../arithmetic/curve.js";
import { linear } from "../arithmetic/linear.js";
import { softmax } from "../arithmetic/softmax.js";
import { HEAT, kernelScale } from "../colours.js";
import { make } from "../dom.js";
import { receptiveField } from "../field.js";
import { PhotoFrame } from "../frame.js";
import { groupOf } from "../links.js";
import { MapView } from "../mapview.js";
import { percent } from "../numbers.js";
import { operand, withOneScale } from "../operands.js";
import { paint } from "../paint.js";
import { grid } from "../parts.js";
import { keepsValues } from "../scales.js";

/** @typedef {import("./studio.js").Studio} Studio */
/** @typedef {import("./words.js").Section} Section */
/** @typedef {import("../api.js").Layer} Layer */

/** Side of the patch whose numbers are written out, in pixels. */
const PATCH = 5;
/** Kernels, and stages of the hierarchy, that are shown. */
const FEW = 4;
/** Most maps that are looked through for the most active one. */
const LOOKED_THROUGH = 64;

/** @type {Record<string, (studio: Studio, section: Section) => Promise<Node[]>>} by section */
export const FIGURES = {
  image,
  convolution,
  relu: beforeAndAfter,
  pooling: beforeAndAfter,
  linear: votes,
  softmax: shares,
  hierarchy,
  heat,
};

async function image(studio) {
  const pixels = await studio.pixels();
  const top = Math.floor((pixels.height - PATCH) / 2);
  const left = Math.floor((pixels.width - PATCH) / 2);
  return [
    framed(picture(pixels, "The exact input, enlarged"), pixels, {
      top,
      left,
      bottom: top + PATCH,
      right: left + PATCH,
    }),
    ...["red", "green", "blue"].map((name, channel) =>
      make(
        "div",
        { class: "channel" },
        grid(`${name}, 5 × 5 pixels`, patch(pixels, top, left, channel), PATCH, shades(channel)),
        make("span", { class: "soft" }, name),
      ),
    ),
  ];
}

async function convolution(studio, { layer: choose }) {
  const { layer, source, tensors } = await found(studio, choose);
  const maps = layer.shape[0];
  const indices = Array.from({ length: Math.min(FEW, maps) }, (_, at) =>
    Math.floor((at * maps) / Math.min(FEW, maps)),
  );
  return Promise.all(
    indices.map(async (index) => {
      const [kernel, made] = await Promise.all([
        tensors.weights(layer.tensor, "weight", index, 1),
        operand(tensors, layer, index),
      ]);
      return make(
        "div",
        { class: "pair" },
        kernelPicture(kernel.values, layer, source, index),
        new MapView({ name: `map ${index + 1}`, ...made, keyed: false }).element,
      );
    }),
  );
}

/** One map before and after a layer, and its function where it has one. */
async function beforeAndAfter(studio, { layer: choose }) {
  const { layer, source, tensors } = await found(studio, choose);
  const index = await mostActive(tensors, layer);
  const operands = await Promise.all([
    operand(tensors, source, source.shape[0] === layer.shape[0] ? index : 0),
    operand(tensors, layer, index),
  ]);
  const [given, made] = keepsValues(layer) ? withOneScale(operands) : operands;
  const size = ([height, width]) => `${height} × ${width}`;
  const view = (name, one) => new MapView({ name: `${name}, ${size(one.size)}`, ...one }).element;
  const known = functionOf(layer);
  const reach = given.values.reduce((one, value) => Math.max(one, Math.abs(value)), 1);
  const curve = known && new Curve(known.of, -reach, reach);
  curve?.point(given.values.reduce((one, value) => Math.max(one, value)));
  return [
    view("before", given),
    ...(known
      ? [make("div", { class: "function" }, curve.element, make("span", { class: "formula" }, known.formula))]
      : [make("span", { class: "arrow", "aria-hidden": "true" }, "→")]),
    view("after", made),
  ];
}

async function votes(studio, { layer: choose }) {
  const context = await found(studio, choose);
  const isList = context.source.shape.slice(1).every((side) => side === 1); // pooled maps of one pixel are one too
  if (!isList) throw new Error("its linear layer reads no plain list of numbers");
  const [best] = await studio.predictions();
  const index = context.layer.shape[0] === context.description.labels.length ? best.index : 0;
  return linear({ ...context, index });
}

async function shares(studio, { layer: choose }) {
  const context = await found(studio, choose);
  if (context.layer.kind !== "Softmax") return [sigmoidCurve()];
  const [best] = await studio.predictions();
  const [, , , table] = await softmax({ ...context, index: best.index });
  return [table];
}

function sigmoidCurve() {
  const { of, formula } = functionOf({ kind: "Sigmoid" });
  const curve = new Curve(of, -6, 6);
  curve.point(2);
  return make("div", { class: "function" }, curve.element, make("span", { class: "formula" }, formula));
}

/** What the strongest value of some layers, from early to late, can see of the input. */
async function hierarchy(studio) {
  const [pixels, tensors, layers] = await Promise.all([studio.pixels(), studio.tensors(), studio.layers()]);
  const fit = layers.filter(({ kind, shape, field }) => kind === "Conv" && shape.length === 3 && field);
  const count = Math.min(FEW, fit.length);
  const stages = Array.from(
    { length: count },
    (_, at) => fit[count === 1 ? 0 : Math.round((at * (fit.length - 1)) / (count - 1))],
  );
  return Promise.all(
    stages.map(async (layer) => {
      const { row, column } = strongest(await tensors.maps(layer.tensor, 0, LOOKED_THROUGH), layer);
      const region = receptiveField(layer.field, row, column, pixels);
      const size = `${region.bottom - region.top} × ${region.right - region.left}`;
      return make(
        "figure",
        {
          class: "seen-part",
          data: { height: region.bottom - region.top, width: region.right - region.left },
        },
        framed(picture(pixels, ""), pixels, region),
        picture(
          cut(pixels, region),
          `What the layer ${layer.name} can see from its strongest place: ${size} pixels`,
        ),
        make("figcaption", {}, make("strong", {}, `layer ${layers.indexOf(layer)}`), ` ${size} pixels`),
      );
    }),
  );
}

async function heat(studio) {
  const [{ cam }, predictions, photo] = await Promise.all([
    studio.description(),
    studio.predictions(),
    studio.photo(),
  ]);
  const labels = predictions.slice(0, cam ? 2 : 1); // another map by occlusion would cost seconds
  return Promise.all(
    labels.map(async ({ label, probability }) => {
      const { heatmap } = await studio.explained(label);
      const frame = new PhotoFrame();
      frame.show(photo);
      const layer = make("canvas", { class: "heat", "aria-hidden": "true" });
      paint(layer, heatmap.values.flat(), heatmap.height, heatmap.width, HEAT);
      frame.substitute.after(layer);
      return make(
        "figure",
        { class: "warm" },
        frame.element,
        make("figcaption", {}, `“${label}”, ${percent(probability)}`),
      );
    }),
  );
}

// --- what the pictures share ---

/** The layer that a section is about, with what its arithmetic needs. */
async function found(studio, choose) {
  const [description, tensors] = await Promise.all([studio.description(), studio.tensors()]);
  const { layers } = description;
  const layer = choose(layers);
  if (!layer) throw new Error("this model has no such layer");
  const sources = layer.sources.map((tensor) => layers.find((one) => one.tensor === tensor)).filter(Boolean);
  return { description, layer, source: sources[0], sources, tensors };
}

/** The map with the largest value, among the first. */
async function mostActive(tensors, layer) {
  return strongest(await tensors.maps(layer.tensor, 0, LOOKED_THROUGH), layer).index;
}

/** Where the largest value of some maps is. */
function strongest({ values }, { shape: [, height = 1, width = 1] }) {
  const at = values.reduce((best, value, place) => (value > values[best] ? place : best), 0);
  const place = at % (height * width);
  return { index: Math.floor(at / (height * width)), row: Math.floor(place / width), column: place % width };
}

/** Pixels on a canvas of their own. @param {ImageData} pixels @param {string} name */
function picture(pixels, name) {
  const canvas = make("canvas", { class: "pixels", width: pixels.width, height: pixels.height });
  if (name) canvas.setAttribute("role", "img");
  canvas.setAttribute(name ? "aria-label" : "aria-hidden", name || "true");
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

/** A picture with a region marked. @param {import("../field.js").Region} region */
function framed(canvas, { width, height }, { top, left, bottom, right }) {
  const part = (value, size) => `${(100 * value) / size}%`;
  const style = {
    left: part(left, width),
    top: part(top, height),
    width: part(right - left, width),
    height: part(bottom - top, height),
  };
  return make("div", { class: "marked" }, canvas, make("div", { class: "field", style }));
}

/** @param {ImageData} pixels @param {import("../field.js").Region} region */
function cut(pixels, { top, left, bottom, right }) {
  const part = new ImageData(right - left, bottom - top);
  for (let y = top; y < bottom; y += 1) {
    const start = 4 * (y * pixels.width + left);
    part.data.set(pixels.data.subarray(start, start + 4 * (right - left)), 4 * (y - top) * (right - left));
  }
  return part;
}

function patch({ data, width }, top, left, channel) {
  return Array.from(
    { length: PATCH * PATCH },
    (_, at) => data[4 * ((top + Math.floor(at / PATCH)) * width + left + (at % PATCH)) + channel],
  );
}

/** From black to one of the three colours. */
function shades(channel) {
  return {
    lowest: 0,
    highest: 255,
    colours: Array.from({ length: 256 }, (_, level) => [0, 1, 2].map((one) => (one === channel ? level : 0))),
  };
}

/** A kernel over red, green and blue as one coloured picture; over other maps, the weights for the first of them. */
function kernelPicture(weights, layer, source, index) {
  const [height, width] = layer.kernel;
  const size = height * width;
  const [first, last] = groupOf(layer, index, source.shape[0]);
  const name = `kernel ${index + 1}`;
  if (last - first + 1 !== 3) {
    const values = weights.subarray(0, size);
    const canvas = make("canvas", { class: "pixels", role: "img", "aria-label": `${name} for the first map` });
    paint(canvas, values, height, width, kernelScale(values));
    return captioned(canvas, name);
  }
  const reach = weights.reduce((one, value) => Math.max(one, Math.abs(value)), 1e-9);
  const pixels = new ImageData(width, height);
  for (let at = 0; at < size; at += 1)
    pixels.data.set(
      [0, 1, 2].map((map) => 128 + (127 * weights[map * size + at]) / reach).concat(255),
      4 * at,
    );
  return captioned(picture(pixels, name), name);
}

function captioned(content, name) {
  return make("figure", { class: "kernel" }, content, make("figcaption", {}, name));
}
